"""Measures speed in llama.cpp (xllamacpp), from the timings that its server reports."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import xllamacpp

from gpu_worker.llama_cpp.client import ask, running
from gpu_worker.progress import Progress
from gpu_worker.speed.compatibility import check_memory, check_pruned_from
from gpu_worker.speed.engines import SpeedRequest
from gpu_worker.speed.gguf_pair import GgufModel, gguf_files
from gpu_worker.speed.timing import Length, Pair, Timing
from gpu_worker.speed.transformers_engine import random_prompts
from protocol.errors import DataError, ModelError
from protocol.results.formats import Formats
from protocol.results.speeds import ModelSize
from protocol.runtime.llama_server import ServerOptions

SPARE = 8
"""Extra positions of each slot beyond the measured text."""


class LlamaCppRunner:
    """A GGUF file served by llama.cpp, with one slot per text of the largest batch."""

    def __init__(self, model: GgufModel, address: str, length: Length) -> None:
        self.model = model
        self._length = length
        self._address = address

    def run(self, batch_size: int) -> Timing:
        """Process a batch of prompts and generate. Raises ModelError if the answer has other lengths."""
        vocabulary = self.model.sizes.vocabulary
        body = {
            "prompt": random_prompts(vocabulary, batch_size, self._length.prompt).tolist(),
            "n_predict": 1 + self._length.generate,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        return timing_of(self.post("/completion", body), self._length)

    def post(self, path: str, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the server's answers, one per prompt. Raises ModelError if no answer comes."""
        answer = ask(self._address, path, body)
        return answer if isinstance(answer, list) else [answer]

    def size(self) -> ModelSize:
        """Return the sizes from the file's tensors and metadata; the KV cache is F16."""
        model = self.model
        return ModelSize(
            decoder_parameters=model.decoder_parameters,
            total_parameters=model.total_parameters,
            weight_bytes=model.weight_bytes,
            kv_cache_bytes_per_token=model.kv_cache_bytes_per_token,
            kv_cache_bytes=model.kv_cache_bytes_per_token * self._length.total,
            disk_bytes=model.path.stat().st_size,
            weight_type=model.weight_type,
        )


def timing_of(answers: Sequence[Mapping[str, Any]], length: Length) -> Timing:
    """Combine the server's `timings` of the texts in a batch.

    The texts run in parallel, so the slowest text determines the batch's time. The first token comes from the prefill
    and is not counted, because the server starts timing the decode after it. Raises ModelError if a text was cut short
    or a prompt came from a cache.
    """
    for answer in answers:
        if "timings" not in answer:
            raise ModelError(f"llama.cpp did not measure: {answer.get('error', answer)}")
        took = answer["timings"]
        if (took["prompt_n"], took["predicted_n"]) != (length.prompt, 1 + length.generate):
            raise ModelError(
                f"llama.cpp processed {took['prompt_n']} and generated {took['predicted_n']} tokens where "
                f"{length.prompt} and {1 + length.generate} were asked for"
            )
    timings = [answer["timings"] for answer in answers]
    return Timing(
        prefill_tokens=sum(took["prompt_n"] for took in timings),
        prefill_seconds=max(took["prompt_ms"] for took in timings) / 1000,
        decode_tokens=sum(took["predicted_n"] - 1 for took in timings),
        decode_seconds=max(took["predicted_ms"] for took in timings) / 1000,
    )


@contextmanager
def open_pair(request: SpeedRequest, formats: Formats, progress: Progress) -> Iterator[Pair]:
    """Serve both models at the same time; converted GGUF files are deleted on exit.

    `formats` are the formats of the folder. Raises UsageError if a model is not available or cannot be converted or
    served, if memory is too small, or if the folder was not pruned from the baseline.
    """
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selfpruner-speed-")))
        dense, pruned = gguf_files(request, formats, made, progress)
        check_pruned_from(dense.sizes, pruned.sizes, request.baseline)
        texts, length = max(request.batch_sizes), request.length
        for model in (dense, pruned):
            if length.total > model.longest:
                raise DataError(f"texts of {length.total} tokens are longer than the {model.longest} of {model.path}")
        device = _device()
        needed = sum(m.weight_bytes + m.kv_cache_bytes_per_token * length.total * texts for m in (dense, pruned))
        check_memory(needed, on_gpu=device != "cpu")
        runners = [
            LlamaCppRunner(model, stack.enter_context(_serving(model, length, texts)), length)
            for model in (dense, pruned)
        ]
        threads = torch.get_num_threads() if device == "cpu" else None
        yield Pair(runners[0], runners[1], device, threads)


def _serving(model: GgufModel, length: Length, texts: int) -> AbstractContextManager[str]:
    """Start a server with a slot for each text of a batch, and yield its address."""
    options = ServerOptions(
        str(model.path),
        torch.get_num_threads(),
        context=texts * (length.total + SPARE),
        slots=texts,
        batch=texts * length.prompt,  # all prompts of a batch at once
        in_memory=True,
    )
    return running(options)


def _device() -> str:
    """Return `cpu`, or the name of the first GPU that llama.cpp sees."""
    kinds = xllamacpp.ggml_backend_dev_type
    gpus = [each for each in xllamacpp.get_device_info() if each["type"] == kinds.GGML_BACKEND_DEVICE_TYPE_GPU]
    return str(gpus[0]["description"]) if gpus else "cpu"
