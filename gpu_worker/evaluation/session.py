"""Prepares the model of one search, measures the dense model, and then measures the model pruned to any plan."""

import math
import time
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gpu_worker.evaluation.preparation import Dense, remembered_dense
from gpu_worker.evaluation.target import Target
from gpu_worker.evaluation.texts import ShareText
from gpu_worker.measuring.divergence import (
    DensePredictions,
    dense_predictions,
    mean_divergence,
    window_divergence,
)
from gpu_worker.measuring.perplexity import checked_perplexity, perplexity_of, read, window_loss
from gpu_worker.measuring.windows import on_device, predicted_counts
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.families import Decoder
from gpu_worker.models.loading import device_name
from gpu_worker.models.machine import has_room
from gpu_worker.progress import Progress, no_progress, steps
from protocol.errors import DataError, ModelError
from protocol.plans.allocation import OUTLIER_THRESHOLD
from protocol.plans.any_heads import AnyHeadsPlan
from protocol.plans.candidate import Measured, Race, Stopped, Text
from protocol.plans.plan import Plan, count_parameters
from protocol.plans.profile import DensePerplexity, ModelProfile
from protocol.plans.shape import ModelShape
from protocol.plans.spec import SearchSpec

DECIMALS = 6
"""Decimals of the losses of single windows, which races compare."""
SMALL = 0.1
"""Share of a GPU's free memory that the dense model's predictions may take there. What takes more stays in main memory,
and is copied for each window."""


class Session:
    """Measures plans of one spec. The constructor runs all stages of preparation and reports them to `progress`.

    Pass `target` if the model is already prepared; `share_text` is for several workers (see Target). Raises UsageError
    for a model or text that is not available, and for a dense model that does not compute finite numbers.
    """

    def __init__(
        self,
        spec: SearchSpec,
        progress: Progress = no_progress,
        *,
        sensitivity: bool = True,
        target: Target | None = None,
        share_text: ShareText | None = None,
    ) -> None:
        self.spec = spec
        self.target = (
            Target(spec, progress, outlier_threshold=OUTLIER_THRESHOLD, share_text=share_text)
            if target is None
            else target
        )
        self._predictions: dict[Text, DensePredictions] = {}
        try:
            self.profile = self._describe(progress, sensitivity)
        except NotFiniteError as error:
            raise ModelError(f"the dense model {spec.model!r} is broken: {error}") from error

    @property
    def shape(self) -> ModelShape:
        """Return the shape of the dense model."""
        return self.target.shape

    def evaluate(self, plan: Plan | AnyHeadsPlan, text: Text = "fitness", progress: Progress = no_progress) -> Measured:
        """Prune to `plan` and measure perplexity on `text`, and KL divergence if the spec measures it.

        Raises PlanMismatchError for a plan of another model, DataError if the spec has no such text, NotFiniteError if
        the pruned model's loss is not finite.
        """
        outcome = self.race(plan, None, text, progress)
        assert isinstance(outcome, Measured), "only a race can stop an evaluation"
        return outcome

    def race(
        self, plan: Plan | AnyHeadsPlan, race: Race | None, text: Text = "fitness", progress: Progress = no_progress
    ) -> Measured | Stopped:
        """Measure as `evaluate` does, but stop as soon as the plan has lost its race."""
        decoder = self.target.model.decoder
        windows, dense = self._windows(text), self._predictions.get(text)
        starts = [0, *accumulate(predicted_counts(windows))]
        start = time.perf_counter()
        self.target.prune(plan)
        seen = _Windows(decoder, starts[-1] / len(windows))
        with self.target.ordered.aligned():
            each = on_device(windows, decoder.device)
            for i, window in enumerate(steps(progress, _measuring("pruned", text), each)):
                kept = None if dense is None else dense.part(slice(starts[i], starts[i + 1]))
                seen.take(window, starts[i + 1] - starts[i], kept)
                if race is not None and race.is_decided_after(i + 1) and race.is_lost(seen.fitness()):
                    break
        figures: dict[str, Any] = {
            "perplexity": seen.perplexity(),
            "kl": None if dense is None else seen.divergence(),
            "parameters": count_parameters(plan, self.shape),
            "tokens": seen.tokens,
            "seconds": time.perf_counter() - start,
        }
        losses = seen.fitness() if race else []
        if race is not None and race.is_lost(losses):
            apart = math.fsum(loss - other for loss, other in zip(losses, race.against, strict=False))
            behind = apart * starts[-1] / len(windows) / seen.tokens
            return Stopped(behind=behind, windows=len(losses), of_windows=len(windows), **figures)
        return Measured(losses=tuple(losses), **figures)

    def _windows(self, text: Text) -> Tensor:
        texts = self.target.texts
        windows = texts.fitness if text == "fitness" else texts.report
        if windows is None:
            raise DataError("the spec has no report text: set data.report")
        return windows

    def _describe(self, progress: Progress, sensitivity: bool) -> ModelProfile:
        texts = self.target.texts
        dense = self._dense("fitness", texts.fitness, progress)
        report = None if texts.report is None else self._dense("report", texts.report, progress)
        rises: tuple[float, ...] = ()
        features: dict[str, tuple[float, ...]] = {}
        if sensitivity:
            rises = self.target.sensitivity()
            features = self.target.features()
        return ModelProfile(
            fingerprint=self.spec.fingerprint,
            model=self.spec.model,
            shape=self.shape,
            dense=dense,
            dense_report=report,
            sensitivity=rises,
            outliers=self.target.outliers,
            features=features,
            texts=texts.digest,
            device=device_name(self.target.model.device),
        )

    def _dense(self, text: Text, windows: Tensor, progress: Progress) -> DensePerplexity:
        """Measure the dense perplexity, and keep the predictions if the spec measures divergence from them."""

        def measure() -> Dense:
            self.target.ordered.restore()
            decoder, stage = self.target.model.decoder, _measuring("dense", text)
            start, predictions = time.perf_counter(), None
            if keeps:
                predictions, value, tokens = dense_predictions(decoder, windows, progress, stage)
            else:
                value, tokens = checked_perplexity(decoder, windows, progress, stage)
            seconds = time.perf_counter() - start
            return DensePerplexity(perplexity=value, tokens=tokens, windows=len(windows), seconds=seconds), predictions

        keeps = self.spec.measure == "kl"
        key = self.target.key | {"predictions": keeps}
        found, predictions = remembered_dense(key, self.spec.model, windows, measure)
        if predictions is not None:
            self._predictions[text] = _nearby(predictions, self.target.model.decoder.head.weight.device)
        return found


def _nearby(predictions: DensePredictions, device: torch.device) -> DensePredictions:
    """Return the predictions on `device` if they take little of its memory, or else where it can read them."""
    if has_room(device, predictions.bytes, SMALL):
        return predictions.to(device)
    return predictions.pinned() if device.type == "cuda" else predictions


def _measuring(what: str, text: Text) -> str:
    """Return the name of the stage that measures the `dense` or `pruned` model on a text."""
    return f"measuring {what}" if text == "fitness" else f"measuring {what} on the {text} text"


class _Windows:
    """The measured windows of one evaluation. Nothing waits for the device until a figure is asked for."""

    def __init__(self, decoder: Decoder, usual: float) -> None:
        """Measure with `decoder`; `usual` is the mean number of predicted tokens per window of the text."""
        self._decoder, self._usual = decoder, usual
        self._tokens: list[int] = []
        self._losses: list[Tensor] = []
        self._divergences: list[Tensor] = []

    def take(self, window: Tensor, predicted: int, dense: DensePredictions | None) -> None:
        """Measure a window [seqlen] with `predicted` tokens, and its divergence if `dense` predictions are given."""
        self._tokens.append(predicted)
        if dense is None:
            with torch.inference_mode():
                self._losses.append(window_loss(self._decoder, window[None]))
        else:
            loss, kl = window_divergence(self._decoder, [window], dense)
            self._losses.append(loss)
            self._divergences.append(kl)

    @property
    def tokens(self) -> int:
        """Return the number of predicted tokens."""
        return sum(self._tokens)

    def perplexity(self) -> float:
        """Return the perplexity of all windows. Raises NotFiniteError if it is not finite."""
        return perplexity_of(math.fsum(read(self._losses)), self.tokens)

    def divergence(self) -> float:
        """Return the mean divergence of all windows in nats. Raises NotFiniteError if it is not finite."""
        return mean_divergence(math.fsum(read(self._divergences)), self.tokens)

    def fitness(self) -> list[float]:
        """Return each window's divergence, or loss if that is not measured, in nats per token of a usual window.

        Their mean over all windows is the mean over all tokens, also if windows have different numbers of tokens.
        Raises NotFiniteError if one is not finite.
        """
        found = read(self._divergences or self._losses)
        if not all(map(math.isfinite, found)):
            raise NotFiniteError("the loss of a window is not finite")
        return [round(value / self._usual, DECIMALS) for value in found]
