"""Dense and pruned in turn, repeat by repeat, and what the figures of it are. Pure: it knows no engine.

A machine that slows down slows both, so that the ratio of two runs next to each other says more than the ratio of two
medians. The speed-up is the median of those ratios.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpu_worker.progress import Progress, no_progress
from protocol.errors import UsageError
from protocol.results.speeds import BatchSpeed, ModelSize, PhaseSpeed, Spread

WARM_UP = 1
"""Repeats before those that count: memory is touched for the first time, kernels are chosen."""


@dataclass(frozen=True)
class Length:
    """How long each text of a batch is."""

    prompt: int
    generate: int

    @property
    def total(self) -> int:
        """Tokens of a text at its end."""
        return self.prompt + self.generate


@dataclass(frozen=True)
class Timing:
    """One run: tokens over all texts of the batch, and the seconds they took."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


class Runner(Protocol):
    """One model, loaded in one engine."""

    def run(self, batch_size: int) -> Timing:
        """Process so many prompts and generate after them."""

    def size(self) -> ModelSize:
        """How large the model is; asked after a run."""


@dataclass(frozen=True)
class Pair:
    """A dense model and what was pruned of it, ready to run in one engine."""

    dense: Runner
    pruned: Runner
    device: str = "cpu"
    threads: int | None = None
    """Of the CPU, where that is the device."""


def alternate(
    pair: Pair, batch_size: int, repeats: int, *, warm_up: int = WARM_UP, progress: Progress = no_progress
) -> list[tuple[Timing, Timing]]:
    """Run dense, pruned, dense, pruned, …: one pair of timings for each repeat after the first `warm_up`."""
    stage = f"measuring batches of {batch_size}"
    found = []
    progress(stage, 0, warm_up + repeats)
    for done in range(warm_up + repeats):
        found.append((pair.dense.run(batch_size), pair.pruned.run(batch_size)))
        progress(stage, done + 1, warm_up + repeats)
    return found[warm_up:]


def measured_batches(
    pair: Pair, batch_sizes: Sequence[int], repeats: int, warm_up: int, progress: Progress
) -> tuple[BatchSpeed, ...]:
    """The figures of each batch size."""
    found = []
    for batch_size in batch_sizes:
        timings = alternate(pair, batch_size, repeats, warm_up=warm_up, progress=progress)
        found.append(compare(batch_size, timings))
    return tuple(found)


def prefixed(progress: Progress, prefix: str) -> Progress:
    """The same, told of stages with `prefix` before their names."""
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)


def compare(batch_size: int, timings: Sequence[tuple[Timing, Timing]]) -> BatchSpeed:
    """The figures of pairs (dense, pruned) of timings. Raises UsageError where something took no time at all."""
    return BatchSpeed(
        batch_size=batch_size,
        prefill=_phase(timings, lambda timing: (timing.prefill_tokens, timing.prefill_seconds)),
        decode=_phase(timings, lambda timing: (timing.decode_tokens, timing.decode_seconds)),
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values))


def _phase(timings: Sequence[tuple[Timing, Timing]], part: Callable[[Timing], tuple[int, float]]) -> PhaseSpeed:
    dense, pruned = ([_rate(*part(pair[which])) for pair in timings] for which in (0, 1))
    return PhaseSpeed(
        tokens=part(timings[0][1])[0],
        dense=spread(dense),
        pruned=spread(pruned),
        speed_up=spread([after / before for before, after in zip(dense, pruned, strict=True)]),
    )


def _rate(tokens: int, seconds: float) -> float:
    if seconds <= 0:
        raise UsageError(f"{tokens} tokens took no time that the clock can tell: give a larger --prompt or --generate")
    return tokens / seconds
