"""The training loop.

This is not transformers' Trainer because the loop is shorter than the Trainer's configuration would be. The Trainer's
checkpoints store random states and the sampler's position, and it has to skip data when it resumes. Here, data order
and dropout follow from the seed and the step, so a resumed run equals an uninterrupted run. The Trainer also takes the
loss from the model's forward pass, which keeps the logits of all tokens; this loop frees them chunk by chunk (loss.py).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from gpu_worker.finetune.checkpoint import Checkpoint, State
from gpu_worker.finetune.data import TrainingData
from gpu_worker.finetune.loss import Teacher, summed_loss
from gpu_worker.finetune.trainable import Trained
from gpu_worker.measuring.examples import Example
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import LOG_INTERVAL_SECONDS, Progress
from protocol.results.finetuning import LossPoint, Recipe
from protocol.runtime.signals import defer_signals


@dataclass(frozen=True)
class Limits:
    """Time limit of fine-tuning, and the interval of checkpoints."""

    seconds: float | None = None
    """Maximum training time in seconds over all restarts. With a limit, the learning rate follows the time or the
    steps, whichever has progressed further."""
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True)
class TrainingSetup:
    """The model, data and settings of a training run."""

    model: LoadedModel
    trained: Trained
    data: TrainingData
    recipe: Recipe
    limits: Limits
    teacher: Teacher | None = None


def train(setup: TrainingSetup, checkpoint: Checkpoint, start: State, progress: Progress) -> State:
    """Fine-tune from `start` until the steps or the time are used up; return the last state, which is also stored.

    The last complete step is stored even after an error. Raises NotFiniteError if a loss or gradient is not finite.
    """
    run = _Run(setup, start)
    kept_at = time.monotonic()
    reporter = _LossReporter(progress, steps_of(setup.recipe, len(setup.data.examples)))
    try:
        while not run.is_over:
            run.step()
            reporter.step(run.losses)
            if time.monotonic() - kept_at >= setup.limits.checkpoint_seconds:
                checkpoint.write(run.state)
                kept_at = time.monotonic()
    except BaseException:  # also for signals, so that no step is lost
        if run.is_whole and len(run.losses) > checkpoint.steps:
            checkpoint.write(run.state)
        raise
    finished = replace(run.state, finished=True)
    checkpoint.write(finished)
    return finished


def steps_of(recipe: Recipe, examples: int) -> int:
    """Return the number of steps; an epoch's last batch may be smaller."""
    steps = recipe.epochs * math.ceil(examples / recipe.batch)
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def batch_of(recipe: Recipe, examples: int, step: int) -> list[int]:
    """Return the indices of the examples of a step, counted from 0. Each epoch has its own shuffle."""
    per_epoch = math.ceil(examples / recipe.batch)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(_mixed(recipe.seed, epoch)))
    batch: list[int] = order[place * recipe.batch : (place + 1) * recipe.batch].tolist()
    return batch


def learning_rate(recipe: Recipe, done: float) -> float:
    """Return the learning rate at the fraction `done` of fine-tuning: linear warm-up, then the recipe's schedule."""
    if done < recipe.warmup:
        return recipe.learning_rate * done / recipe.warmup
    fallen = min((done - recipe.warmup) / (1 - recipe.warmup), 1.0)
    factors = {"cosine": 0.5 * (1 + math.cos(math.pi * fallen)), "linear": 1 - fallen, "constant": 1.0}
    return recipe.learning_rate * factors[recipe.schedule]


def _mixed(seed: int, number: int) -> int:
    """Return a seed for one of many generators."""
    return (seed * 1_000_003 + number) % 2**63


class _Run:
    """The state of a training run."""

    def __init__(self, setup: TrainingSetup, start: State) -> None:
        self._model, self._trained, self._data = setup.model, setup.trained, setup.data
        self._recipe, self._limits, self._teacher = setup.recipe, setup.limits, setup.teacher
        self._optimizer = torch.optim.AdamW(
            setup.trained.masters, lr=setup.recipe.learning_rate, weight_decay=setup.recipe.weight_decay, fused=True
        )
        self._steps = steps_of(setup.recipe, len(setup.data.examples))
        if start.losses:
            setup.trained.load(start.masters)
            self._optimizer.load_state_dict(start.optimizer)
        self._start = start
        self._began = time.monotonic()
        self.losses = list(start.losses)
        self.is_whole = True
        """False if an error has interrupted a step, so that masters and optimizer are inconsistent."""

    @property
    def seconds(self) -> float:
        """Return the training time over all restarts."""
        return self._start.seconds + time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        """Return whether the steps or the time are used up. At least one step is always run."""
        out_of_time = self._limits.seconds is not None and self.seconds >= self._limits.seconds
        return self._start.finished or len(self.losses) >= self._steps or (out_of_time and bool(self.losses))

    @property
    def state(self) -> State:
        """Return the state after the last step, for a checkpoint."""
        return State(
            masters=[master.detach() for master in self._trained.masters],
            optimizer=self._optimizer.state_dict(),
            losses=tuple(self.losses),
            seconds=self.seconds,
        )

    def step(self) -> None:
        """Run one optimizer step on one batch."""
        number = len(self.losses)
        torch.manual_seed(_mixed(self._recipe.seed, number))  # dropout
        self._optimizer.zero_grad(set_to_none=True)
        batch = [self._data.examples[i] for i in batch_of(self._recipe, len(self._data.examples), number)]
        tokens = sum(example.predicted for example in batch)
        loss = 0.0
        with torch.enable_grad():
            for examples in _micro_batches(batch, self._recipe.micro_batch):
                part = summed_loss(self._model.decoder, examples, self._teacher) / tokens
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.item()
        norm = nn.utils.clip_grad_norm_(self._trained.masters, self._recipe.clip)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise NotFiniteError(
                f"at step {number + 1} the loss is {loss} and its gradient {norm.item()}: lower the learning rate "
                f"({self._recipe.learning_rate}), or use the dtype float32"
            )
        rate = learning_rate(self._recipe, self._share_done(number))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with defer_signals():
            self.is_whole = False
            self._optimizer.step()
            self._trained.write_back()
            self.losses.append(
                LossPoint(step=number + 1, loss=loss, learning_rate=rate, tokens=tokens, seconds=self.seconds)
            )
            self.is_whole = True

    def _share_done(self, number: int) -> float:
        """Return the share of the schedule that is done, by steps or by time, whichever is larger.

        The current step counts as half done, so that no step has a learning rate of zero.
        """
        by_steps = (number + 0.5) / self._steps
        if self._limits.seconds is None:
            return by_steps
        return max(by_steps, min(self.seconds / self._limits.seconds, 1.0))


def _micro_batches(batch: list[Example], size: int) -> Iterator[list[Example]]:
    """Split a batch by length, so that little padding is needed."""
    by_length = sorted(batch, key=lambda example: len(example.tokens))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]


class _LossReporter:
    """Reports steps, with the recent mean loss in the stage's name.

    The name changes rarely, because each new name is logged.
    """

    def __init__(self, progress: Progress, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._total, self._clock = progress, total, clock
        self._stage, self._changed_at = "fine-tuning", -math.inf
        self._losses: list[float] = []

    def step(self, losses: list[LossPoint]) -> None:
        """Report a step, the last of `losses`."""
        self._losses.append(losses[-1].loss)
        if self._clock() - self._changed_at >= LOG_INTERVAL_SECONDS or len(losses) == self._total:
            self._stage = f"fine-tuning, loss {sum(self._losses) / len(self._losses):.3f}"
            self._changed_at, self._losses = self._clock(), []
        self._progress(self._stage, len(losses), self._total)


def mean_losses(losses: tuple[LossPoint, ...]) -> tuple[float, float]:
    """Return the mean losses of the first and the last tenth of the steps."""
    count = max(1, len(losses) // 10)
    first, last = (math.fsum(point.loss for point in part) / count for part in (losses[:count], losses[-count:]))
    return first, last
