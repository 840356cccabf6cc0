"""Runs the dense and the pruned model in turn and computes speeds, in any engine.

A slowdown of the machine affects both models, so the ratio of two adjacent runs is more reliable than the ratio of two
medians. The speed-up is the median of these ratios.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

from gpu_worker.progress import Progress, no_progress
from protocol.errors import UsageError
from protocol.results.speeds import BatchSpeed, ModelSize, PhaseSpeed, Spread
from protocol.runtime.signals import Interrupted

WARM_UP = 1
"""Number of first repeats that are not counted, because memory is first touched and kernels are selected in them."""


@dataclass(frozen=True)
class Length:
    """Lengths in tokens of each text of a batch."""

    prompt: int
    generate: int

    @property
    def total(self) -> int:
        """Return the tokens of a complete text."""
        return self.prompt + self.generate


@dataclass(frozen=True)
class Timing:
    """One run: tokens of all texts of the batch, and seconds."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


class Runner(Protocol):
    """One model, loaded in one engine."""

    def run(self, batch_size: int) -> Timing:
        """Process a batch of prompts and generate after each prompt."""

    def size(self) -> ModelSize:
        """Return the sizes of the model; called after a run."""


@dataclass(frozen=True)
class Pair:
    """A dense model and its pruned version, ready to run in one engine."""

    dense: Runner
    pruned: Runner
    device: str = "cpu"
    threads: int | None = None
    """CPU threads, if the device is the CPU."""


def alternate(
    pair: Pair, batch_size: int, repeats: int, *, warm_up: int = WARM_UP, progress: Progress = no_progress
) -> Iterator[tuple[Timing, Timing]]:
    """Run the dense and the pruned model in turn; yield both timings of each repeat after the first `warm_up`."""
    stage = f"measuring batches of {batch_size}"
    progress(stage, 0, warm_up + repeats)
    for done in range(warm_up + repeats):
        timings = pair.dense.run(batch_size), pair.pruned.run(batch_size)
        progress(stage, done + 1, warm_up + repeats)
        if done >= warm_up:
            yield timings


def measured_batches(
    pair: Pair, batch_sizes: Sequence[int], repeats: int, warm_up: int, progress: Progress
) -> tuple[tuple[BatchSpeed, ...], Interrupted | None]:
    """Measure each batch size, until a signal comes. Return the speeds of all whole repeats, and the interruption."""
    found, interruption = [], None
    for batch_size in batch_sizes:
        timings: list[tuple[Timing, Timing]] = []
        try:
            for both in alternate(pair, batch_size, repeats, warm_up=warm_up, progress=progress):
                timings.append(both)  # noqa: PERF402  (what was measured before an interruption must be kept)
        except Interrupted as end:
            interruption = end
        with suppress(UsageError) if interruption else nullcontext():  # the interruption counts, not times too short
            found += [compare(batch_size, timings)] if timings else []
        if interruption:
            break
    return tuple(found), interruption


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Return a Progress that adds `prefix` to the names of stages."""
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)


def compare(batch_size: int, timings: Sequence[tuple[Timing, Timing]]) -> BatchSpeed:
    """Compute the speeds of (dense, pruned) timings. Raises UsageError if a time is too short to measure."""
    return BatchSpeed(
        batch_size=batch_size,
        repeats=len(timings),
        prefill=_phase(timings, lambda timing: (timing.prefill_tokens, timing.prefill_seconds)),
        decode=_phase(timings, lambda timing: (timing.decode_tokens, timing.decode_seconds)),
    )


def spread(values: Sequence[float]) -> Spread:
    """Return median and range."""
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
        raise UsageError(f"{tokens} tokens took too little time to measure: give a larger --prompt or --generate")
    return tokens / seconds
