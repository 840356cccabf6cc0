"""The target model made ready to be pruned: loaded, its texts read, its pieces scored, its weights ordered."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from gpu_worker.measuring.corpora import GenerateText, Texts, load_roles, load_texts
from gpu_worker.measuring.self_text import self_text
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.families import Decoder, Layer
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.models.memory import Workload
from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning.calibration import LayerActivations, LayerProducts, calibrate, calibrate_products
from gpu_worker.pruning.elimination import optimal_brain_surgeon
from gpu_worker.pruning.importance import (
    LayerImportance,
    gradient_salience,
    grouped,
    magnitude,
    outlier_share,
    wanda_sp,
)
from gpu_worker.pruning.ordered_model import OrderedModel
from gpu_worker.pruning.sequential import prune_sequentially
from protocol.errors import DataError, ModelError
from protocol.plans.any_heads import AnyHeadsPlan
from protocol.plans.plan import Plan
from protocol.plans.shape import LayerShape, ModelShape
from protocol.plans.spec import SearchSpec

ShareText = Callable[[int, int, Callable[[], Tensor]], Tensor]
"""Windows, their length and what writes them -> the tokens that all workers use (measuring/shared_text.py)."""


class Target:
    """The model of a spec, with the spec's texts. Making one takes as long as its stages; `progress` hears of each.

    With `outlier_threshold` (OWL's M) the layers' `outliers` are counted too, which only the dense model shows. `check`
    may refuse the loaded model. `share_text` makes text that the model writes the same for several workers. Where
    nothing is `measured` on the spec's texts, that for calibration alone is read. Raises UsageError for a model or a
    text that cannot be had.
    """

    def __init__(
        self,
        spec: SearchSpec,
        progress: Progress = no_progress,
        *,
        outlier_threshold: float | None = None,
        check: Callable[[LoadedModel], None] | None = None,
        share_text: ShareText | None = None,
        measured: bool = True,
    ) -> None:
        self.spec = spec
        self._progress = progress
        self._scored: tuple[Plan, int] | None = None
        self.model = _load(spec, progress)
        check_length(self.model, max(text.seqlen for text in spec.texts.values()))
        if check is not None:
            check(self.model)
        self.calibration, self._texts = _read_texts(spec, self.model, progress, share_text, measured=measured)
        decoder, windows = self.model.decoder, self.calibration
        seen, products = _statistics(decoder, spec, windows, progress, outliers=outlier_threshold is not None)
        self.outliers: tuple[float, ...] = ()
        if outlier_threshold is not None:
            pairs = zip(decoder.layers, seen, strict=True)
            self.outliers = tuple(outlier_share(layer, each, outlier_threshold) for layer, each in pairs)
        self.importance = score(self.model, spec, seen, products, windows, progress)
        """On the dense model, one entry per layer."""
        self.ordered = OrderedModel(decoder, self.importance)
        if _is_fitted(spec):
            _reconstruct(self.ordered, products, progress)

    @property
    def texts(self) -> Texts:
        """What is measured on, beside what is scored on."""
        assert self._texts is not None, "on this target nothing is measured"
        return self._texts

    @property
    def shape(self) -> ModelShape:
        """Shape of the dense model."""
        return self.model.decoder.shape

    def prune(self, plan: Plan | AnyHeadsPlan) -> None:
        """Prune to `plan`, whatever was applied before. Raises PlanMismatchError for a plan of another model.

        A plan that removes any query heads is masked, and is for dense scoring alone.
        """
        if isinstance(plan, AnyHeadsPlan):
            assert self.spec.scoring == "dense", "sequential scores are of plans that slice"
            self.ordered.mask(plan)
        elif self.spec.scoring == "dense":
            self.ordered.apply(plan)
        elif self._scored != (plan, self.ordered.changes):  # the same plan may be measured on several texts
            reconstruct = self.spec.reconstruction == "least-squares"
            prune_sequentially(self.ordered, plan, self.calibration, self._progress, reconstruct=reconstruct)
            self._scored = (plan, self.ordered.changes)


def _is_fitted(spec: SearchSpec) -> bool:
    """Whether all layers are fitted beforehand, to what enters them in the dense model."""
    return spec.reconstruction == "least-squares" and spec.scoring == "dense"


def _statistics(
    decoder: Decoder, spec: SearchSpec, windows: Tensor, progress: Progress, *, outliers: bool
) -> tuple[tuple[LayerActivations, ...], list[LayerProducts]]:
    """What of the dense model's inputs the spec needs, by one pass: activations, and products; else none."""
    if _is_fitted(spec) or spec.importance == "obs":
        seen, products = calibrate_products(decoder, windows, progress)
        return seen, list(products)
    return calibrate(decoder, windows, progress) if outliers or spec.importance == "wanda-sp" else (), []


def _reconstruct(ordered: OrderedModel, products: list[LayerProducts], progress: Progress) -> None:
    """Fit every layer to what enters it in the dense model, and let go its `products`.

    Raises ModelError where that is no number.
    """
    products.reverse()
    try:
        for i in steps(progress, "preparing reconstruction", range(len(ordered.decoder.layers))):
            ordered.fit(i, ordered.in_order(i, products.pop()))
    except NotFiniteError as error:
        raise ModelError(f"the dense model is broken: {error}") from error


def check_length(model: LoadedModel, seqlen: int) -> None:
    """Raise DataError for windows longer than the model's positions reach: what it says there means nothing."""
    longest = model.longest_positions
    if longest is not None and seqlen > longest:
        raise DataError(f"windows of {seqlen} tokens are longer than the {longest} positions that the model knows")


def score(
    model: LoadedModel,
    spec: SearchSpec,
    seen: Sequence[LayerActivations],
    products: Sequence[LayerProducts],
    windows: Tensor,
    progress: Progress = no_progress,
) -> list[LayerImportance]:
    """The importance of each layer's pieces on the dense model, as `spec` says.

    `seen` is for wanda-sp alone, and `products` are for obs.
    """
    decoder = model.decoder
    layers = list(zip(decoder.layers, decoder.shape.layers, strict=True))
    if spec.importance == "magnitude":
        return [magnitude(layer, shape) for layer, shape in steps(progress, "scoring", layers)]
    if spec.importance == "taylor":
        salience = gradient_salience(decoder, windows, progress)
        return [grouped(each, shape) for each, (_, shape) in zip(salience, layers, strict=True)]
    if spec.importance == "obs":
        return _eliminated(layers, products, progress)
    each_layer = steps(progress, "scoring", layers)
    return [wanda_sp(layer, each, shape) for each, (layer, shape) in zip(seen, each_layer, strict=True)]


def _eliminated(
    layers: Sequence[tuple[Layer, LayerShape]], products: Sequence[LayerProducts], progress: Progress
) -> list[LayerImportance]:
    """By backward elimination. Raises ModelError where what enters a projection is no number."""
    each_layer = steps(progress, "scoring", layers)
    try:
        return [
            optimal_brain_surgeon(layer, each, shape) for each, (layer, shape) in zip(products, each_layer, strict=True)
        ]
    except NotFiniteError as error:
        raise ModelError(f"the dense model is broken: {error}") from error


def _load(spec: SearchSpec, progress: Progress) -> LoadedModel:
    progress("loading model", 0, 1)
    model = load_model(spec.model, spec.dtype, Workload.of(spec))
    progress("loading model", 1, 1)
    return model


def _read_texts(
    spec: SearchSpec, model: LoadedModel, progress: Progress, share_text: ShareText | None, *, measured: bool
) -> tuple[Tensor, Texts | None]:
    """The windows to score on, and where anything is measured those of all roles."""

    def written(windows: int, length: int) -> Tensor:
        write = partial(self_text, model, windows, length, spec.seed, progress)
        return share_text(windows, length, write) if share_text else write()

    progress("reading texts", 0, 1)
    how: tuple[Any, GenerateText, int | None] = (model.tokenizer, written, model.window_start)
    texts = load_texts(spec, *how) if measured else None
    alone = (
        texts.calibration if texts else load_roles({"calibration": spec.calibration}, spec.seed, *how)["calibration"]
    )
    progress("reading texts", 1, 1)
    return alone, texts
