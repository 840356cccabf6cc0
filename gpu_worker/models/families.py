"""Describes where each model family keeps its decoder layers, projections and norms, and computes the model shape.

The rest of the package does not use module names of transformers: it uses the `Decoder` of a loaded model. To add a
family, add an entry to `FAMILIES`. Fused projections are split when the decoder is extracted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpu_worker.models.errors import quoted
from protocol.errors import ModelError
from protocol.plans.shape import LayerShape, ModelShape

PRUNED = "pruned_"
"""Prefix of the model type of an exported model; the rest names the family."""


@dataclass(frozen=True)
class Family:
    """Module paths of one family: `body` to `head` relative to the model, all others relative to a decoder layer."""

    name: str
    body: str = "model"
    embedding: str = "model.embed_tokens"
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
    """Modules of the attention block that are never pruned: its norms."""
    mlp_extras: tuple[str, ...] = ("post_attention_layernorm",)
    """Modules of the MLP block that are never pruned."""
    starts_with_bos: bool = False
    """Whether every window must begin with the bos token. Other families are measured without it, as papers do."""
    fused_attention: str | None = None
    """Path of the matrix that fuses query, key and value; `query`, `key` and `value` are then paths in the module that
    replaces this matrix."""
    fused_mlp: str | None = None
    """Path of the matrix that fuses gate and up."""


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms over one head's width that all heads share, so pruning heads does not change them."""

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # Llama 1, 2, 3, 3.1, Vicuna and SmolLM2 share one model type.
        Family(name="llama"),
        Family(name="mistral"),
        # Biases on query, key and value.
        Family(name="qwen2"),
        Family(name="qwen3", attention_extras=("input_layernorm", *_HEAD_NORMS)),
        # Some layers do not rotate their heads.
        Family(name="smollm3"),
        Family(name="seed_oss"),
        Family(name="ernie4_5"),
        Family(
            name="hunyuan_v1_dense",
            attention_extras=("input_layernorm", "self_attn.query_layernorm", "self_attn.key_layernorm"),
        ),
        # Norms after each block only.
        Family(
            name="exaone4",
            attention_extras=("post_attention_layernorm", *_HEAD_NORMS),
            mlp_extras=("post_feedforward_layernorm",),
        ),
        # Norms before and after each block.
        Family(
            name="gemma3_text",
            attention_extras=("input_layernorm", "post_attention_layernorm", *_HEAD_NORMS),
            mlp_extras=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            # WikiText perplexity of the 270M model: 32 without bos, 18 with it.
            starts_with_bos=True,
        ),
        Family(
            name="phi3",
            query="self_attn.qkv_proj.q_proj",
            key="self_attn.qkv_proj.k_proj",
            value="self_attn.qkv_proj.v_proj",
            gate="mlp.gate_up_proj.gate_proj",
            up="mlp.gate_up_proj.up_proj",
            fused_attention="self_attn.qkv_proj",
            fused_mlp="mlp.gate_up_proj",
        ),
    )
}
"""Supported families by the config's `model_type`."""


class SideBySide(nn.ModuleDict):
    """Several linear layers with one input and concatenated outputs: replaces a fused projection."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs of all parts, in order]."""
        return torch.cat([linear(hidden) for linear in self.values()], dim=-1)


class _OwnHeads:
    """A view of the model's config for one attention module, with that module's own number of query heads."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self._config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not set yet while the object is being copied
            raise AttributeError(name)
        return getattr(self._config, name)


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

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Return all seven projections."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    def set_head_counts(self, kv_heads: int, queries_per_kv: int) -> None:
        """Set the attention's numbers of heads, unless transformers derives them from the projections' widths."""
        attention: Any = self.attention
        attention.num_key_value_groups = queries_per_kv
        if isinstance(attention.config, _OwnHeads):
            attention.num_key_value_heads = kv_heads
            attention.config.num_attention_heads = kv_heads * queries_per_kv


@dataclass(frozen=True)
class Decoder:
    """The parts of a loaded model: `body` maps token ids to final hidden states, `head` maps these to logits.

    `embedding` and `norm` are the first and last step of the body, around the decoder layers.
    """

    body: nn.Module
    embedding: nn.Module
    norm: nn.Module
    head: nn.Linear
    layers: tuple[Layer, ...]
    shape: ModelShape

    @property
    def device(self) -> torch.device:
        """Return the device for token ids: the first device if the model is spread over several."""
        return next(self.embedding.parameters()).device


def family_of(config: Any) -> Family:
    """Return the family of a dense or exported model's config. Raises ModelError for an unsupported model type."""
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type).removeprefix(PRUNED))
    if family is None:
        raise ModelError(
            f"models of type {quoted(model_type)} cannot be pruned; "
            f"supported model types: {', '.join(sorted(FAMILIES))}"
        )
    return family


def head_dim_of(config: Any) -> int:
    """Return the width of one attention head; hidden size / query heads for configs without `head_dim`."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def extract_decoder(model: Any) -> Decoder:
    """Return the decoder of a causal language model, and split its fused projections in place.

    Raises ModelError for an unsupported family, and for a model with other parameters than its family has (adapters,
    quantised weights), because pruning would silently miss some of these parameters.
    """
    family = family_of(model.config)
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        raise ModelError(f"models of type {family.name!r} with final_logit_softcapping cannot be measured")
    head_dim = head_dim_of(model.config)
    layers = tuple(_layer(family, module, head_dim) for module in model.get_submodule(family.layers))
    shape = _shape(family, model, layers, head_dim)
    paths = (family.body, family.embedding, family.norm, family.head)
    body, embedding, norm, head = (model.get_submodule(path) for path in paths)
    return Decoder(body, embedding, norm, head, layers, shape)


def _layer(family: Family, module: nn.Module, head_dim: int) -> Layer:
    if family.fused_attention is not None:
        attention: Any = module.get_submodule(family.attention)
        kv_rows = attention.num_key_value_heads * head_dim
        query_rows = _linear_at(module, family.output).in_features
        _split(module, family.fused_attention, {"q_proj": query_rows, "k_proj": kv_rows, "v_proj": kv_rows})
        attention.config = _OwnHeads(attention.config, query_rows // head_dim)
    if family.fused_mlp is not None:
        channels = _linear_at(module, family.down).in_features
        _split(module, family.fused_mlp, {"gate_proj": channels, "up_proj": channels})
    names = ("attention", "query", "key", "value", "output", "gate", "up", "down")
    return Layer(module, **{name: module.get_submodule(getattr(family, name)) for name in names})  # type: ignore[arg-type]


def _linear_at(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _split(module: nn.Module, path: str, rows: dict[str, int]) -> None:
    """Replace the fused linear layer at `path` by its parts, with `rows` outputs each, as views of its weight."""
    fused = _linear_at(module, path)
    if sum(rows.values()) != fused.out_features:
        raise ModelError(f"{path} has {fused.out_features} outputs where its parts add up to {sum(rows.values())}")
    weights = torch.split(fused.weight, list(rows.values()))
    biases = [None] * len(rows) if fused.bias is None else torch.split(fused.bias, list(rows.values()))
    parts = {name: _linear(weight, bias) for (name, weight, bias) in zip(rows, weights, biases, strict=True)}
    module.set_submodule(path, SideBySide(parts))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return linear


def _shape(family: Family, model: Any, layers: tuple[Layer, ...], head_dim: int) -> ModelShape:
    first = layers[0]
    in_layers = sum(p.numel() for layer in layers for p in layer.module.parameters())
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
        other_parameters=total - in_layers,
    )
    _check_counts(shape, layers)
    return shape


def _check_counts(shape: ModelShape, layers: tuple[Layer, ...]) -> None:
    """Raise ModelError unless the model shape accounts for every parameter of every layer."""
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
    """Return the number of parameters of one output of a linear layer, including its bias."""
    return linear.in_features + (0 if linear.bias is None else 1)


def _bias(linear: nn.Linear) -> int:
    return 0 if linear.bias is None else linear.bias.numel()


def _count(module: nn.Module, paths: Iterable[str]) -> int:
    return sum(p.numel() for path in paths for p in module.get_submodule(path).parameters())
