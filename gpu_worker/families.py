"""Where a model family keeps its decoder layers, projections and norms, and the shape that follows from them.

The rest of the package never names a module of transformers: it asks for the `Decoder` of a loaded model. A new family
whose projections are separate linear layers is one more entry of `FAMILIES`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from protocol.errors import ModelError
from protocol.shape import LayerShape, ModelShape


@dataclass(frozen=True)
class Family:
    """Module paths of one family: the first four from the model, the others from a decoder layer."""

    name: str
    body: str = "model"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_extras: tuple[str, ...] = ("input_layernorm",)
    """What belongs to the attention block and is never pruned: norms outside it and inside it."""
    mlp_extras: tuple[str, ...] = ("post_attention_layernorm",)
    """The same for the MLP block."""


FAMILIES: dict[str, Family] = {
    # Llama 1, 2, 3, Vicuna and SmolLM2 share one model type.
    "llama": Family(name="llama"),
}
"""Supported families by the config's `model_type`."""


@dataclass(frozen=True)
class Layer:
    """The modules of one decoder layer that pruning touches."""

    module: nn.Module
    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


@dataclass(frozen=True)
class Decoder:
    """A loaded model, taken apart: `body` maps token ids to final hidden states, `head` those to logits.

    `norm` is the body's last step, after the decoder layers.
    """

    body: nn.Module
    norm: nn.Module
    head: nn.Linear
    layers: tuple[Layer, ...]
    shape: ModelShape


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises ModelError that lists the supported ones."""
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} cannot be pruned; supported model types: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def head_dim_of(config: Any) -> int:
    """Width of one attention head. Configs without `head_dim` mean hidden size / query heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def take_apart(model: Any) -> Decoder:
    """The decoder of a dense causal language model as transformers loads it.

    Raises ModelError for an unsupported family, and for a model whose parameters are not those its family should have
    (adapters, quantised weights): pruning it would silently miss some of them.
    """
    family = family_of(model.config)
    layers = tuple(_layer(family, module) for module in model.get_submodule(family.layers))
    shape = _shape(family, model, layers)
    body, norm, head = (model.get_submodule(path) for path in (family.body, family.norm, family.head))
    return Decoder(body, norm, head, layers, shape)


def _layer(family: Family, module: nn.Module) -> Layer:
    names = ("attention", "query", "key", "value", "output", "gate", "up", "down")
    return Layer(module, **{name: module.get_submodule(getattr(family, name)) for name in names})  # type: ignore[arg-type]


def _shape(family: Family, model: Any, layers: tuple[Layer, ...]) -> ModelShape:
    first = layers[0]
    head_dim = head_dim_of(model.config)
    per_layer = sum(p.numel() for p in first.module.parameters())
    total = sum(p.numel() for p in model.parameters())
    shape = ModelShape(
        family=family.name,
        hidden_size=first.query.in_features,
        head_dim=head_dim,
        layers=tuple(_layer_shape(layer, head_dim) for layer in layers),
        query_head_parameters=head_dim * (_row(first.query) + first.output.out_features),
        kv_head_parameters=head_dim * (_row(first.key) + _row(first.value)),
        channel_parameters=_row(first.gate) + _row(first.up) + first.down.out_features,
        attention_fixed=_bias(first.output) + _count(first.module, family.attention_extras),
        mlp_fixed=_bias(first.down) + _count(first.module, family.mlp_extras),
        other_parameters=total - per_layer * len(layers),
    )
    _check_counts(shape, layers)
    return shape


def _check_counts(shape: ModelShape, layers: tuple[Layer, ...]) -> None:
    """Raise ModelError unless the shape accounts for every parameter of every layer."""
    for i, layer in enumerate(layers):
        real = sum(p.numel() for p in layer.module.parameters())
        if real != shape.layer_parameters(i):
            raise ModelError(
                f"decoder layer {i} has {real:,} parameters where a {shape.family} layer of its size has "
                f"{shape.layer_parameters(i):,}; pass the plain, unquantised model without adapters"
            )


def _layer_shape(layer: Layer, head_dim: int) -> LayerShape:
    return LayerShape(
        query_heads=layer.query.out_features // head_dim,
        kv_heads=layer.key.out_features // head_dim,
        mlp_channels=layer.gate.out_features,
    )


def _row(linear: nn.Linear) -> int:
    """Parameters of one output of a linear layer, its bias included."""
    return linear.in_features + (0 if linear.bias is None else 1)


def _bias(linear: nn.Linear) -> int:
    return 0 if linear.bias is None else linear.bias.numel()


def _count(module: nn.Module, paths: Iterable[str]) -> int:
    return sum(p.numel() for path in paths for p in module.get_submodule(path).parameters())
