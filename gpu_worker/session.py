"""One model made ready for one search: loaded, calibrated, ordered, measured dense; then any plan is measured on it."""

import math
import time

import torch
from torch import Tensor

from gpu_worker.calibration import calibrate
from gpu_worker.corpora import Texts, load_texts
from gpu_worker.divergence import DensePredictions, dense_predictions, divergence
from gpu_worker.importance import wanda_sp
from gpu_worker.models import LoadedModel, load_model
from gpu_worker.perplexity import perplexity
from gpu_worker.progress import Progress, no_progress
from gpu_worker.pruning import OrderedModel
from gpu_worker.self_text import self_text
from gpu_worker.sensitivity import measure_sensitivity
from protocol.candidate import Measured, Text
from protocol.card import DensePerplexity, ModelCard
from protocol.errors import DataError
from protocol.plan import Plan, count_parameters
from protocol.shape import ModelShape
from protocol.spec import SearchSpec


class Session:
    """Measures plans of one spec. Making one takes as long as its stages; `progress` hears of each.

    Raises UsageError for a model or a text that cannot be had, NotFiniteError where even the dense model is broken.
    """

    def __init__(self, spec: SearchSpec, progress: Progress = no_progress, *, sensitivity: bool = True) -> None:
        self.spec = spec
        model = _load(spec, progress)
        self._texts = _read_texts(spec, model, progress)
        self._ordered = _order(model, self._texts.calibration, progress)
        self._predictions: dict[Text, DensePredictions] = {}
        self.card = self._describe(model, progress, sensitivity)

    @property
    def shape(self) -> ModelShape:
        """Shape of the dense model."""
        return self._ordered.decoder.shape

    def evaluate(self, plan: Plan, text: Text = "fitness") -> Measured:
        """Prune to `plan` and measure `text`: its perplexity, and `kl` where that is the spec's; seconds are wall time.

        Raises PlanMismatchError for a plan of another model, DataError where the spec has no such text,
        NotFiniteError where the pruned model does not compute.
        """
        windows = self._windows(text)
        start = time.perf_counter()
        self._ordered.apply(plan)
        value, tokens, kl = self._measure(windows, text)
        return Measured(
            perplexity=value,
            kl=kl,
            parameters=count_parameters(plan, self.shape),
            tokens=tokens,
            seconds=time.perf_counter() - start,
        )

    def _measure(self, windows: Tensor, text: Text) -> tuple[float, int, float | None]:
        """Perplexity, tokens, and the divergence from the dense model where its predictions were kept."""
        dense = self._predictions.get(text)
        if dense is None:
            return *perplexity(self._ordered.decoder, windows), None
        found = divergence(self._ordered.decoder, windows, dense)
        return found.perplexity, found.tokens, found.kl

    def _windows(self, text: Text) -> Tensor:
        windows = self._texts.fitness if text == "fitness" else self._texts.report
        if windows is None:
            raise DataError("there is no text to report on: set data.report")
        return windows

    def _describe(self, model: LoadedModel, progress: Progress, sensitivity: bool) -> ModelCard:
        fitness = self._texts.fitness
        return ModelCard(
            fingerprint=self.spec.fingerprint,
            model=self.spec.model,
            shape=self.shape,
            dense=self._dense("fitness", fitness, progress),
            dense_report=None if self._texts.report is None else self._dense("report", self._texts.report, progress),
            sensitivity=measure_sensitivity(self._ordered, self.spec, self._texts.calibration, progress)
            if sensitivity
            else (),
            texts=self._texts.digest,
            device=device_name(model.device),
        )

    def _dense(self, text: Text, windows: Tensor, progress: Progress) -> DensePerplexity:
        """Perplexity of the dense model, whose predictions are kept where divergence from them will be measured."""
        self._ordered.restore()
        start = time.perf_counter()
        if self.spec.measure == "kl":
            self._predictions[text], value, tokens = dense_predictions(self._ordered.decoder, windows, progress)
        else:
            value, tokens = watched_perplexity(self._ordered, windows, progress)
        return DensePerplexity(perplexity=value, tokens=tokens, seconds=time.perf_counter() - start)


def watched_perplexity(ordered: OrderedModel, windows: Tensor, progress: Progress) -> tuple[float, int]:
    """As `perplexity`, with progress: the mean loss of equally long windows is the mean of their means."""
    losses = []
    tokens = 0
    for done, window in enumerate(windows, start=1):
        value, counted = perplexity(ordered.decoder, window[None])
        losses.append(math.log(value))
        tokens += counted
        progress("measuring dense", done, len(windows))
    return math.exp(math.fsum(losses) / len(losses)), tokens


def device_name(device: torch.device) -> str:
    """`cpu`, or `cuda` with what the GPU calls itself."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _load(spec: SearchSpec, progress: Progress) -> LoadedModel:
    progress("loading model", 0, 1)
    model = load_model(spec.model, spec.dtype)
    progress("loading model", 1, 1)
    return model


def _read_texts(spec: SearchSpec, model: LoadedModel, progress: Progress) -> Texts:
    progress("reading texts", 0, 1)
    texts = load_texts(
        spec, model.tokenizer, lambda windows, length: self_text(model, windows, length, spec.seed, progress)
    )
    progress("reading texts", 1, 1)
    return texts


def _order(model: LoadedModel, windows: Tensor, progress: Progress) -> OrderedModel:
    """The model with its weights in order of importance, scored on `windows`."""
    decoder = model.decoder
    activations = calibrate(decoder, windows, progress)
    scores = [
        wanda_sp(layer, seen, shape)
        for layer, seen, shape in zip(decoder.layers, activations, decoder.shape.layers, strict=True)
    ]
    return OrderedModel(decoder, scores)
