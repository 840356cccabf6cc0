"""Orders a model's weights by importance once, so that every plan keeps a prefix of them and pruning is slicing.

The rows of q/k/v and gate/up, and the columns of o and down, are permuted: KV heads by importance, query heads within
their KV head by importance, and channels by importance. The permuted model computes the same function. Applying a plan
only sets views: k, v, gate and up keep their first rows; o and down are stored transposed, so that their first columns
are the first rows of the storage. If a plan keeps fewer query heads per KV head, the kept rows of q (and columns of o)
are not adjacent and are copied; the copy is freed when the next plan is applied. With reconstruction, o and down of
every pruned block are such copies, fitted by least squares.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpu_worker.models.families import Decoder, Layer
from gpu_worker.pruning.calibration import LayerProducts
from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.reconstruction import FittedColumns
from protocol.plans.any_heads import AnyHeadsPlan
from protocol.plans.plan import LayerPlan, Plan, dense_plan
from protocol.plans.shape import LayerShape

ALIGNMENT = 64
"""Widths of MLPs are computed in multiples of this many channels, which suits the tensor cores of all GPUs."""


class PlanMismatchError(ValueError):
    """The plan does not fit the model: it keeps more than the model has, or has another number of layers."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a linear layer in order of importance: weight [pieces, ..., inputs], bias [pieces, ...] or None.

    Pieces are KV heads or MLP channels. For KV heads, the dimensions `...` are query heads (only q_proj) and head dim.
    """

    weight: Tensor
    bias: Tensor | None

    def first(self, *counts: int) -> tuple[Tensor, Tensor | None]:
        """Return the first `counts[i]` entries along each leading dimension i, as rows; a view if possible."""
        pick = tuple(slice(count) for count in counts)
        weight = self.weight[pick].reshape(-1, self.weight.shape[-1])
        return weight, None if self.bias is None else self.bias[pick].reshape(-1)


@dataclass(frozen=True)
class _Columns:
    """Columns of a linear layer in order of importance, stored as rows: [pieces, ..., outputs], as in `_Rows`."""

    stored: Tensor

    def first(self, *counts: int) -> Tensor:
        """Return the weight [outputs, kept inputs] of the first `counts[i]` entries along each leading dimension i."""
        pick = tuple(slice(count) for count in counts)
        return self.stored[pick].reshape(-1, self.stored.shape[-1]).t()

    def at(self, kept: Tensor) -> Tensor:
        """Return the weight [outputs, kept inputs] of the columns that `kept` [pieces, ...] marks."""
        return self.stored[kept.to(self.stored.device)].t()


@dataclass(frozen=True)
class _Order:
    """The original index of each piece of an ordered layer."""

    kv: Tensor
    """[KV heads]."""
    queries: Tensor
    """[KV heads in their new order, query heads per KV head]: indices within the KV head."""
    channels: Tensor
    """[MLP channels]."""

    @classmethod
    def of(cls, importance: LayerImportance) -> "_Order":
        """Return the order by falling importance."""
        kv = _descending(importance.kv_heads)
        return cls(kv, _descending(importance.query_heads)[kv], _descending(importance.channels))

    def of_products(self, products: LayerProducts) -> LayerProducts:
        """Return a layer's input `products`, which are in the original order, in this order."""
        each = self.queries.shape[1]
        heads = (self.kv[:, None] * each + self.queries).flatten()
        width = len(products.attention_output) // len(heads)
        columns = (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()
        return LayerProducts(
            _both_ways(products.attention_output, columns), _both_ways(products.mlp_output, self.channels)
        )

    def inverse(self) -> "_Order":
        """Return the order that undoes this one."""
        kv = self.kv.argsort()
        return _Order(kv, self.queries.argsort(dim=1)[kv], self.channels.argsort())


class _OrderedLayer:
    """One decoder layer with permuted weights."""

    def __init__(self, layer: Layer, shape: LayerShape, order: _Order) -> None:
        self._layer = layer
        self._shape = shape
        kv, queries, channels = (
            where.to(layer.query.weight.device) for where in (order.kv, order.queries, order.channels)
        )
        groups, each = shape.kv_heads, shape.queries_per_kv
        self._query = _query_rows(layer.query, groups, each, kv, queries)
        self._key, self._value = (_order_rows(linear, (groups, -1), kv) for linear in (layer.key, layer.value))
        heads = layer.output.weight.t().reshape(groups, each, -1, layer.output.out_features)
        self._output: _Columns | FittedColumns = _Columns(heads[kv[:, None], queries].contiguous())
        self._gate, self._up = (_order_rows(linear, (-1,), channels) for linear in (layer.gate, layer.up))
        self._down: _Columns | FittedColumns = _Columns(layer.down.weight.t()[channels].contiguous())
        self._heads: tuple[int, int] | None = None
        """What the applied plan keeps: KV heads, and query heads per KV head. None if it must be applied again."""
        self._channels: int | None = None

    def fit(self, products: LayerProducts, *, damping: float, in_main_memory: bool) -> None:
        """Reconstruct the kept columns from now on, using input `products` in the layer's order."""
        output, down = self._output.stored, self._down.stored
        self._output, self._down = (
            FittedColumns(stored, inputs, damping=damping, in_main_memory=in_main_memory)
            for stored, inputs in ((output, products.attention_output), (down, products.mlp_output))
        )
        self._heads = self._channels = None

    def fit_error(self, plan: LayerPlan) -> float | None:
        """See OrderedModel.fit_error."""
        if not (isinstance(self._output, FittedColumns) and isinstance(self._down, FittedColumns)):
            return None
        heads = self._output.energies(plan.kv_heads, plan.queries_per_kv)
        channels = self._down.energies(plan.mlp_channels)
        pruned = [kept_all for kept_all in (heads, channels) if kept_all[0] != kept_all[1]] or [heads]
        whole = sum(whole for _, whole in pruned)
        return 1 - sum(kept for kept, _ in pruned) / whole if whole else 0.0  # a block may compute nothing

    def drop_fit(self) -> None:
        """Stop reconstructing. The weights of the applied plan do not change."""
        self._output, self._down = _Columns(self._output.stored), _Columns(self._down.stored)
        self._heads = self._channels = None

    def apply(self, plan: LayerPlan) -> None:
        """Prune the layer to `plan`. A block that keeps what it keeps already is left alone."""
        layer, kv, each, channels = self._layer, plan.kv_heads, plan.queries_per_kv, plan.mlp_channels
        if self._heads != (kv, each):
            self._heads = None  # until all is set: memory may run out
            _set_linear(layer.query, *self._query.first(kv, each))
            _set_linear(layer.key, *self._key.first(kv))
            _set_linear(layer.value, *self._value.first(kv))
            _set_linear(layer.output, self._output.first(kv, each), layer.output.bias)
            layer.set_head_counts(kv, each)
            self._heads = (kv, each)
        if self._channels != channels:
            self._channels = None
            self._set_width(channels)
            _set_linear(layer.down, self._down.first(channels), layer.down.bias)
            self._channels = channels

    @contextmanager
    def aligned(self) -> Iterator[None]:
        """See OrderedModel.aligned."""
        channels, down = self._layer.down.in_features, self._layer.down
        wide = min(-(-channels // ALIGNMENT) * ALIGNMENT, self._shape.mlp_channels)
        if wide == channels:
            yield
            return
        self._set_width(wide)
        handle = down.register_forward_pre_hook(lambda _, inputs: (inputs[0][..., :channels],))
        try:
            yield
        finally:
            handle.remove()
            self._set_width(channels)

    def _set_width(self, channels: int) -> None:
        """Let the MLP compute `channels` channels; down is not changed."""
        _set_linear(self._layer.gate, *self._gate.first(channels))
        _set_linear(self._layer.up, *self._up.first(channels))

    def mask(self, kept: Tensor, channels: int) -> None:
        """Keep `channels` MLP channels, and zero the columns of o_proj that belong to removed query heads.

        `kept` is [KV heads, query heads per KV head], in the layer's order.
        """
        whole = self._shape
        self.apply(LayerPlan(kv_heads=whole.kv_heads, queries_per_kv=whole.queries_per_kv, mlp_channels=channels))
        output = self._layer.output
        columns = kept[..., None].expand(self._output.stored.shape[:-1])
        weight = torch.zeros_like(output.weight)
        weight[:, columns.flatten().to(weight.device)] = self._output.at(columns)
        _set_linear(output, weight, output.bias)
        self._heads = None

    def check(self, plan: LayerPlan) -> None:
        """Raise PlanMismatchError if `plan` keeps more than the layer has."""
        has = self._shape
        if (
            plan.kv_heads > has.kv_heads
            or plan.queries_per_kv > has.queries_per_kv
            or plan.mlp_channels > has.mlp_channels
        ):
            raise PlanMismatchError(f"the plan keeps ({plan!r}) more than the layer has ({has!r})")


class OrderedModel:
    """A model whose weights are ordered by importance, so that any plan is applied by slicing.

    The ordered weights replace the original weights in the decoder. `importance` has one entry per layer. The model
    computes the same function until a plan is applied.
    """

    def __init__(self, decoder: Decoder, importance: Sequence[LayerImportance]) -> None:
        self.decoder = decoder
        self.changes = 0
        """Number of changes of the weights so far. A caller can compare it to tell whether the weights have changed
        since it pruned."""
        self._dense = dense_plan(decoder.shape).layers
        self._orders: list[_Order | None] = [None] * len(decoder.layers)
        self._layers: list[_OrderedLayer] = []
        for i, scores in enumerate(importance):
            self._layers.append(self._ordered(i, _Order.of(scores)))
            self._orders[i] = _Order.of(scores)

    def reorder(self, layer: int, importance: LayerImportance) -> None:
        """Order a layer, which must be in its original order, by `importance`."""
        assert self._orders[layer] is None, "call `restore_order` before scoring the layer again"
        self.changes += 1
        order = _Order.of(importance)
        self._layers[layer] = self._ordered(layer, order)
        self._orders[layer] = order

    def fit(self, layer: int, products: LayerProducts, *, damping: float, in_main_memory: bool = False) -> None:
        """Reconstruct decoder layer `layer` from now on when it is pruned (gpu_worker/pruning/reconstruction.py).

        `products` are the layer's input products in its current order, and `damping` is the ridge of the fit
        (`damping_for`). A new order drops the fit. The matrices of the
        fit are kept on the layer's device, or `in_main_memory`.
        """
        with torch.no_grad():
            self._layers[layer].fit(products, damping=damping, in_main_memory=in_main_memory)

    def in_order(self, layer: int, products: LayerProducts) -> LayerProducts:
        """Return the layer's input `products`, which are in the original order, in the layer's current order."""
        order = self._orders[layer]
        return products if order is None else order.of_products(products)

    def fit_error(self, layer: int, plan: LayerPlan) -> float | None:
        """Return the share of the energy of o_proj's and down_proj's outputs that the fit of `plan` loses.

        A projection that loses no columns does not count. Returns None without a fit.
        """
        return self._layers[layer].fit_error(plan)

    def drop_fit(self, layer: int) -> None:
        """Free the data that `fit` keeps of decoder layer `layer`. The applied plan stays reconstructed."""
        self._layers[layer].drop_fit()

    def restore_order(self, layer: int) -> None:
        """Make a layer dense and restore its original order exactly."""
        self.changes += 1
        order = self._orders[layer]
        self._layers[layer].apply(self._dense[layer])
        if order is not None:
            self._layers[layer] = self._ordered(layer, order.inverse())
            self._orders[layer] = None

    def _ordered(self, layer: int, order: _Order) -> _OrderedLayer:
        with torch.no_grad():
            ordered = _OrderedLayer(self.decoder.layers[layer], self.decoder.shape.layers[layer], order)
            # Applied immediately, so that a layer's former weights are freed before the next layer is copied.
            ordered.apply(self._dense[layer])
        return ordered

    def check(self, plan: Plan) -> None:
        """Raise PlanMismatchError for a plan of another model."""
        if len(plan.layers) != len(self._layers):
            raise PlanMismatchError(f"the plan is for {len(plan.layers)} layers, the model has {len(self._layers)}")
        for layer, kept in zip(self._layers, plan.layers, strict=True):
            layer.check(kept)

    def apply(self, plan: Plan) -> None:
        """Prune to `plan`, replacing any plan applied before. Raises PlanMismatchError for a plan of another model."""
        self.check(plan)
        self.changes += 1
        with torch.no_grad():
            for layer, kept in zip(self._layers, plan.layers, strict=True):
                layer.apply(kept)

    def mask(self, plan: AnyHeadsPlan) -> None:
        """Apply `plan` as a mask, in which removed heads have no effect; it replaces any plan applied before.

        Raises PlanMismatchError for a plan of another model.
        """
        self._check_masks(plan)
        self.changes += 1
        with torch.no_grad():
            for layer, order, masked in zip(self._layers, self._orders, plan.layers, strict=True):
                kept = torch.tensor(masked.kept)
                if order is not None:
                    kept = kept[order.kv.cpu()[:, None], order.queries.cpu()]
                layer.mask(kept, masked.mlp_channels)

    def _check_masks(self, plan: AnyHeadsPlan) -> None:
        """Raise PlanMismatchError for a plan of another model."""
        theirs = [(tuple(map(len, layer.kept)), layer.mlp_channels) for layer in plan.layers]
        ours = [((s.queries_per_kv,) * s.kv_heads, s.mlp_channels) for s in self.decoder.shape.layers]
        if len(theirs) != len(ours) or any(
            heads != own or channels > most for (heads, channels), (own, most) in zip(theirs, ours, strict=True)
        ):
            raise PlanMismatchError("the plan that removes any query heads is for another model")

    @contextmanager
    def aligned(self) -> Iterator[None]:
        """Compute the applied plan's MLPs at widths that are multiples of ALIGNMENT, with equal results.

        The outputs of gate and up have a few more channels, which are cut off before down. So each row of these
        matrices begins at an address that a GPU's fast kernels can read; at an odd width, rows of two-byte values do
        not.
        """
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.aligned())
            yield

    def apply_layer(self, layer: int, plan: LayerPlan) -> None:
        """Prune decoder layer `layer` to `plan` without changing the others."""
        self._layers[layer].check(plan)
        self.changes += 1
        with torch.no_grad():
            self._layers[layer].apply(plan)

    def restore(self) -> None:
        """Make the model dense again."""
        self.apply(dense_plan(self.decoder.shape))


def _both_ways(products: Tensor, order: Tensor) -> Tensor:
    """Return `products` with rows and columns in `order`."""
    order = order.to(products.device)
    return products[order][:, order]


def _descending(scores: Tensor) -> Tensor:
    """Return indices by falling score along the last dimension; ties keep the original order."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True)


def _order_rows(linear: nn.Linear, pieces: tuple[int, ...], order: Tensor) -> _Rows:
    """Return the rows of `linear`, reshaped to `pieces`, in `order` along the first dimension."""
    weight = linear.weight.view(*pieces, linear.in_features) if len(pieces) > 1 else linear.weight
    bias = None if linear.bias is None else linear.bias.view(*pieces)[order].contiguous()
    return _Rows(weight[order].contiguous(), bias)


def _query_rows(linear: nn.Linear, groups: int, each: int, kv: Tensor, queries: Tensor) -> _Rows:
    """Return the rows of q_proj as [KV heads, query heads, head dim], in order of importance."""
    pick = (kv[:, None], queries)
    weight = linear.weight.view(groups, each, -1, linear.in_features)[pick].contiguous()
    bias = None if linear.bias is None else linear.bias.view(groups, each, -1)[pick].contiguous()
    return _Rows(weight, bias)


def _set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Set the parameters of `linear` and its sizes."""
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    linear.out_features, linear.in_features = weight.shape
