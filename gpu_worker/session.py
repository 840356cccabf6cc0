"""One model made ready for one search: loaded, calibrated, ordered, measured dense; then any plan is measured on it."""

import time

import torch
from torch import Tensor

from gpu_worker.divergence import DensePredictions, dense_predictions, divergence
from gpu_worker.perplexity import NotFiniteError, checked_perplexity, perplexity
from gpu_worker.progress import Progress, no_progress
from gpu_worker.sensitivity import measure_curves
from gpu_worker.target import Share, Target
from protocol.allocation import OUTLIER_THRESHOLD
from protocol.alone import curve_rates
from protocol.candidate import Measured, Text
from protocol.card import DensePerplexity, ModelCard
from protocol.errors import DataError, ModelError
from protocol.plan import Plan, count_parameters
from protocol.shape import ModelShape
from protocol.spec import SearchSpec


class Session:
    """Measures plans of one spec. Making one takes as long as its stages; `progress` hears of each.

    `target` is given where the model is ready already; `share` is for several workers (see Target). Raises UsageError
    for a model or a text that cannot be had and for a model that does not compute even when dense.
    """

    def __init__(
        self,
        spec: SearchSpec,
        progress: Progress = no_progress,
        *,
        sensitivity: bool = True,
        target: Target | None = None,
        share: Share | None = None,
    ) -> None:
        self.spec = spec
        self.target = (
            Target(spec, progress, outlier_threshold=OUTLIER_THRESHOLD, share=share) if target is None else target
        )
        self._predictions: dict[Text, DensePredictions] = {}
        try:
            self.card = self._describe(progress, sensitivity)
        except NotFiniteError as error:
            raise ModelError(f"the dense model {spec.model!r} is broken: {error}") from error

    @property
    def shape(self) -> ModelShape:
        """Shape of the dense model."""
        return self.target.shape

    def evaluate(self, plan: Plan, text: Text = "fitness", progress: Progress = no_progress) -> Measured:
        """Prune to `plan` and measure `text`: its perplexity, and `kl` where that is the spec's; seconds are wall time.

        Raises PlanMismatchError for a plan of another model, DataError where the spec has no such text,
        NotFiniteError where the pruned model does not compute.
        """
        windows = self._windows(text)
        start = time.perf_counter()
        self.target.prune(plan)
        value, tokens, kl = self._measure(windows, text, progress)
        return Measured(
            perplexity=value,
            kl=kl,
            parameters=count_parameters(plan, self.shape),
            tokens=tokens,
            seconds=time.perf_counter() - start,
        )

    def _measure(self, windows: Tensor, text: Text, progress: Progress) -> tuple[float, int, float | None]:
        """Perplexity, tokens, and the divergence from the dense model where its predictions were kept."""
        dense, decoder, stage = self._predictions.get(text), self.target.model.decoder, _measuring("pruned", text)
        if dense is None:
            return *perplexity(decoder, windows, progress, stage), None
        found = divergence(decoder, windows, dense, progress, stage)
        return found.perplexity, found.tokens, found.kl

    def _windows(self, text: Text) -> Tensor:
        texts = self.target.texts
        windows = texts.fitness if text == "fitness" else texts.report
        if windows is None:
            raise DataError("there is no text to report on: set data.report")
        return windows

    def _describe(self, progress: Progress, sensitivity: bool) -> ModelCard:
        texts = self.target.texts
        dense = self._dense("fitness", texts.fitness, progress)
        report = None if texts.report is None else self._dense("report", texts.report, progress)
        rates = curve_rates(self.spec)
        curves = (
            measure_curves(self.target.ordered, self.spec, texts.calibration, rates, progress) if sensitivity else ()
        )
        return ModelCard(
            fingerprint=self.spec.fingerprint,
            model=self.spec.model,
            shape=self.shape,
            dense=dense,
            dense_report=report,
            sensitivity=tuple(curve[rates.index(self.spec.rate)][1] for curve in curves),
            curves=curves,
            outliers=self.target.outliers,
            texts=texts.digest,
            device=device_name(self.target.model.device),
        )

    def _dense(self, text: Text, windows: Tensor, progress: Progress) -> DensePerplexity:
        """Perplexity of the dense model, whose predictions are kept where divergence from them will be measured."""
        self.target.ordered.restore()
        decoder, stage = self.target.model.decoder, _measuring("dense", text)
        start = time.perf_counter()
        if self.spec.measure == "kl":
            self._predictions[text], value, tokens = dense_predictions(decoder, windows, progress, stage)
        else:
            value, tokens = checked_perplexity(decoder, windows, progress, stage)
        return DensePerplexity(perplexity=value, tokens=tokens, seconds=time.perf_counter() - start)


def _measuring(what: str, text: Text) -> str:
    """The stage that measures the `dense` or the `pruned` model on one of its texts."""
    return f"measuring {what}" if text == "fitness" else f"measuring {what} on the {text} text"


def device_name(device: torch.device) -> str:
    """`cpu`, or `cuda` with what the GPU calls itself."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
