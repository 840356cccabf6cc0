"""Measures speed in transformers: one forward pass over the prompts, then one token at a time with the KV cache."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from gpu_worker.evaluation.texts import check_length
from gpu_worker.measuring.half_precision import warn_if_slow
from gpu_worker.models.loading import LoadedModel, device_name, load_side_by_side
from gpu_worker.models.memory import Workload, kv_cache_bytes
from gpu_worker.speed.compatibility import Sizes, check_pruned_from
from gpu_worker.speed.engines import SpeedRequest
from gpu_worker.speed.timing import Length, Pair, Timing
from protocol.results.speeds import ModelSize

Clock = Callable[[], float]


class TransformersRunner:
    """A model in transformers with a static KV cache, which is preallocated and not copied for each token.

    Prompts are random tokens, the same for each model and repeat, because their content does not affect the speed.
    """

    def __init__(self, model: LoadedModel, length: Length, *, clock: Clock = time.perf_counter) -> None:
        self.model = model
        self._length = length
        self._clock = clock
        self._cached = 0
        self._devices = devices_of(model)
        body = model.decoder.body
        self._argument = "cache" if "cache" in signature(type(body).forward).parameters else "past_key_values"

    def run(self, batch_size: int) -> Timing:
        """Process a batch of prompts and generate greedily after each prompt."""
        prompts = random_prompts(self.model.decoder.head.out_features, batch_size, self._length.prompt)
        prompts = prompts.to(self.model.device)
        cache = StaticCache(self.model.causal_lm.config, max_cache_len=self._length.total)
        with torch.inference_mode():
            start = self._now()
            newest = self._next(prompts, cache)
            filled = self._now()
            for _ in range(self._length.generate):
                newest = self._next(newest, cache)
            end = self._now()
        self._cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // batch_size
        return Timing(
            batch_size * self._length.prompt, filled - start, batch_size * self._length.generate, end - filled
        )

    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        """Return the most probable tokens [batch, 1] after `tokens` [batch, new], which are added to `cache`."""
        decoder = self.model.decoder
        hidden = decoder.body(input_ids=tokens, use_cache=True, **{self._argument: cache}).last_hidden_state
        logits: Tensor = decoder.head(hidden[:, -1:])
        return logits.argmax(-1).to(self.model.device)

    def _now(self) -> float:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return self._clock()

    def size(self) -> ModelSize:
        """Return the sizes of the model's tensors and of the last run's KV cache."""
        shape, dtype = self.model.decoder.shape, self.model.causal_lm.dtype
        return ModelSize(
            decoder_parameters=shape.decoder_parameters,
            total_parameters=shape.total_parameters,
            weight_bytes=sum(parameter.nbytes for parameter in self.model.causal_lm.parameters()),
            kv_cache_bytes_per_token=kv_cache_bytes(shape, dtype.itemsize, 1),
            kv_cache_bytes=self._cached,
            disk_bytes=_weight_files_bytes(self.model.causal_lm.config.name_or_path),
            weight_type=str(dtype).removeprefix("torch."),
        )


def devices_of(model: LoadedModel) -> tuple[torch.device, ...]:
    """Return all devices that hold a part of the model, starting with the embedding's device."""
    return tuple(dict.fromkeys([model.device, *(weight.device for weight in model.causal_lm.parameters())]))


def random_prompts(vocabulary: int, texts: int, tokens: int) -> Tensor:
    """Return token ids [texts, tokens], the same at each call."""
    return torch.randint(vocabulary, (texts, tokens), generator=torch.Generator().manual_seed(0))


@contextmanager
def open_pair(request: SpeedRequest) -> Iterator[Pair]:
    """Load both models as `selfpruner evaluate` does, on the same GPUs.

    Raises UsageError if a model is not available, if the texts are too long, if memory is too small, or if the folder
    was not pruned from the baseline.
    """
    workload = Workload(request.length.total * max(request.batch_sizes), keeps_kv_cache=True)
    dense, pruned = load_side_by_side((request.baseline, str(request.folder)), request.dtype, workload)
    for model in (dense, pruned):
        check_length(model, request.length.total)
    check_pruned_from(_sizes(dense), _sizes(pruned), request.baseline)
    warn_if_slow(request.dtype, dense.device, "torch is several times as fast")
    devices = dict.fromkeys([*devices_of(dense), *devices_of(pruned)])
    threads = torch.get_num_threads() if dense.device.type == "cpu" else None
    runners = [TransformersRunner(model, request.length) for model in (dense, pruned)]
    yield Pair(runners[0], runners[1], ", ".join(map(device_name, devices)), threads)


def _sizes(model: LoadedModel) -> Sizes:
    shape = model.decoder.shape
    return Sizes(shape.family, shape.hidden_size, model.decoder.head.out_features, shape.head_dim, shape.layers)


def _weight_files_bytes(source: str) -> int | None:
    """Return the bytes of a folder's weight files; None for a name on the hub."""
    files = [file for suffix in ("safetensors", "bin") for file in Path(source).glob(f"*.{suffix}")]
    return sum(file.stat().st_size for file in files) if files else None
