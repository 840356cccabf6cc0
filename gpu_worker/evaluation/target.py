"""Prepares the target model for pruning: loads it, reads texts, scores heads and channels, orders weights."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gpu_worker.evaluation.features import measure_features
from gpu_worker.evaluation.integer_program import measure_levels
from gpu_worker.evaluation.preparation import (
    Calibration,
    preparation_key,
    remembered_calibration,
    remembered_units,
)
from gpu_worker.evaluation.sensitivity import measure_sensitivity
from gpu_worker.evaluation.texts import ShareText, check_length, count_windows, read_texts
from gpu_worker.measuring.corpora import Texts
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.families import Decoder
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.models.memory import Workload
from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning.calibration import (
    LayerActivations,
    LayerProducts,
    calibrate,
    calibrate_layer_by_layer,
    calibrate_products,
)
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
from gpu_worker.pruning.reconstruction import damping_for
from gpu_worker.pruning.sequential import prune_sequentially
from protocol.errors import ModelError
from protocol.plans.any_heads import AnyHeadsPlan
from protocol.plans.plan import Plan
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Role, SearchSpec, TextSpec


class Target:
    """The model of a spec with its texts. The constructor runs all stages and reports them to `progress`.

    With `outlier_threshold` (OWL's M), each layer's `outliers` are counted on the dense model. `check` is called with
    the loaded model and may raise. If the model writes a text, `share_text` makes all workers use the same text. With
    `measured=False`, only the calibration text is read. Without `model`, the model of the spec is loaded.
    Raises UsageError for a model or text that is not available.
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
        model: LoadedModel | None = None,
    ) -> None:
        self.spec = spec
        self._progress = progress
        self._scored: tuple[Plan, int] | None = None
        needed: Mapping[Role, TextSpec] = spec.texts if measured else {"calibration": spec.calibration}
        self.model = _load(spec, needed, progress) if model is None else model
        check_length(self.model, max(text.seqlen for text in needed.values()))
        if check is not None:
            check(self.model)
        self._texts = read_texts(self.model, needed, spec.seed, progress, share_text)
        self.calibration = self._texts["calibration"]
        self.key = preparation_key(self.model, spec, self.calibration)
        """What everything in the cache depends on that is measured of this target."""
        decoder = self.model.decoder
        try:
            found = self._calibrated(outliers=outlier_threshold is not None)
            self.importance = found.importance
            """Scores of the dense model, one entry per layer."""
            self.outliers: tuple[float, ...] = ()
            if outlier_threshold is not None:
                pairs = zip(decoder.layers, found.activations, strict=True)
                self.outliers = tuple(outlier_share(layer, each, outlier_threshold) for layer, each in pairs)
            self.ordered = OrderedModel(decoder, self.importance)
            if is_fitted(spec):
                damping = damping_for(self.calibration.numel())
                in_main_memory = self.model.fit_in_main_memory
                _reconstruct(self.ordered, found.products, progress, damping=damping, in_main_memory=in_main_memory)
        except NotFiniteError as error:
            raise ModelError(f"the dense model is broken: {error}") from error

    def _calibrated(self, *, outliers: bool) -> Calibration:
        """Return what the calibration text says, from the cache if it is there."""
        spec, model, windows, progress = self.spec, self.model, self.calibration, self._progress
        fitted = is_fitted(spec)
        needed = {"activations": outliers or fitted or spec.importance in ("wanda-sp", "obs"), "products": fitted}

        def compute() -> Calibration:
            if fitted and model.fit_in_main_memory:
                seen, products = calibrate_layer_by_layer(model.decoder, windows, progress)
            else:
                seen, products = _statistics(model.decoder, spec, windows, progress, activations=needed["activations"])
            return Calibration(
                score(model, spec, seen, products, windows, progress), list(seen), (fitted and products) or []
            )

        devices = [layer.output.weight.device for layer in model.decoder.layers]
        products_on = torch.device("cpu") if model.fit_in_main_memory else None
        return remembered_calibration(self.key | needed, spec.model, devices, compute, products_on=products_on)

    def sensitivity(self) -> tuple[float, ...]:
        """Return KL(dense ‖ pruned) of each unit pruned alone (see `measure_sensitivity`); prune again afterwards."""
        return remembered_units(
            "sensitivity",
            self.key,
            self.spec,
            lambda: measure_sensitivity(self.ordered, self.spec, self.calibration, self._progress),
        )

    def levels(self) -> dict[str, tuple[float, ...]]:
        """Return the same for several sizes of each unit (see `measure_levels`); prune again afterwards."""
        return remembered_units(
            "levels",
            self.key,
            self.spec.model_copy(update={"rate": 0.5, "lowest_rate": 0.0, "highest_rate": 0.95}),  # the same for all
            lambda: measure_levels(self.ordered, self.spec, self.calibration, self._progress),
        )

    def features(self) -> dict[str, tuple[float, ...]]:
        """Return other features of each unit (see `measure_features`); prune again afterwards."""
        return remembered_units(
            "features",
            self.key,
            self.spec,
            lambda: measure_features(self.ordered, self.importance, self.spec, self.calibration),
        )

    @property
    def texts(self) -> Texts:
        """Return the texts of all roles."""
        assert "fitness" in self._texts, "this target was prepared without evaluation texts"
        return Texts.of(self._texts)

    @property
    def shape(self) -> ModelShape:
        """Return the shape of the dense model."""
        return self.model.decoder.shape

    def prune(self, plan: Plan | AnyHeadsPlan) -> None:
        """Prune to `plan`, replacing any plan applied before. Raises PlanMismatchError for a plan of another model.

        An AnyHeadsPlan is applied as a mask, and needs dense scoring.
        """
        if isinstance(plan, AnyHeadsPlan):
            assert self.spec.scoring == "dense", "sequential scoring works only with plans that slice"
            self.ordered.mask(plan)
        elif self.spec.scoring == "dense":
            self.ordered.apply(plan)
        elif self._scored != (plan, self.ordered.changes):  # the same plan may be measured on several texts
            reconstruct = self.spec.reconstruction == "least-squares"
            prune_sequentially(self.ordered, plan, self.calibration, self._progress, reconstruct=reconstruct)
            self._scored = (plan, self.ordered.changes)


def is_fitted(spec: SearchSpec) -> bool:
    """Return whether all layers are prepared for reconstruction from the dense model's activations."""
    return spec.reconstruction == "least-squares" and spec.scoring == "dense"


def _statistics(
    decoder: Decoder, spec: SearchSpec, windows: Tensor, progress: Progress, *, activations: bool
) -> tuple[tuple[LayerActivations, ...], list[LayerProducts]]:
    """Collect in one pass the activations and input products that the spec needs; the rest is empty."""
    if is_fitted(spec) or spec.importance == "obs":
        seen, products = calibrate_products(decoder, windows, progress)
        return seen, list(products)
    return calibrate(decoder, windows, progress) if activations else (), []


def _reconstruct(
    ordered: OrderedModel, products: list[LayerProducts], progress: Progress, *, damping: float, in_main_memory: bool
) -> None:
    """Prepare the reconstruction of every layer from the dense model's `products`, and free the products.

    Raises NotFiniteError if they are not finite.
    """
    products.reverse()
    for i in steps(progress, "preparing reconstruction", range(len(ordered.decoder.layers))):
        each = ordered.in_order(i, products.pop())
        ordered.fit(i, each, damping=damping, in_main_memory=in_main_memory)


def score(
    model: LoadedModel,
    spec: SearchSpec,
    seen: Sequence[LayerActivations],
    products: Sequence[LayerProducts],
    windows: Tensor,
    progress: Progress = no_progress,
) -> list[LayerImportance]:
    """Return the importance of each layer's heads and channels on the dense model, by the spec's method.

    `seen` is used by wanda-sp, `products` by obs. Raises NotFiniteError if obs finds inputs that are not finite.
    """
    decoder = model.decoder
    layers = list(zip(decoder.layers, decoder.shape.layers, strict=True))
    if spec.importance == "magnitude":
        return [magnitude(layer, shape) for layer, shape in steps(progress, "scoring", layers)]
    if spec.importance == "taylor":
        salience = gradient_salience(decoder, windows, progress)
        return [grouped(each, shape) for each, (_, shape) in zip(salience, layers, strict=True)]
    each_layer = steps(progress, "scoring", layers)
    if spec.importance == "obs":
        pairs = zip(products, each_layer, strict=True)
        return [optimal_brain_surgeon(layer, each, shape) for each, (layer, shape) in pairs]
    return [wanda_sp(layer, each, shape) for each, (layer, shape) in zip(seen, each_layer, strict=True)]


def _load(spec: SearchSpec, texts: Mapping[Role, TextSpec], progress: Progress) -> LoadedModel:
    progress("loading model", 0, 1)
    model = load_model(spec.model, spec.dtype, Workload.of(spec), lambda bare: count_windows(bare, texts, spec.seed))
    progress("loading model", 1, 1)
    return model
