"""The shape of a target model: its prunable units and the parameters of each piece. Pure data, no torch."""

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from protocol.plans.value import Value

Granularity = Literal["layer", "block"]
BlockKind = Literal["layer", "attention", "mlp"]


class LayerShape(Value):
    """One decoder layer: query heads, KV heads (a divisor of the query heads) and MLP channels."""

    query_heads: PositiveInt
    kv_heads: PositiveInt
    mlp_channels: PositiveInt

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head; 1 for multi-head attention."""
        return self.query_heads // self.kv_heads


class Unit(Value):
    """The part of a model that one pruning rate applies to: a decoder layer, its attention block or its MLP block."""

    layer: int
    kind: BlockKind
    parameters: int
    """Parameters of the unit before pruning, norms and biases included."""
    fewest: int
    """Parameters left by the strongest pruning: one KV head with one query head, one channel, the norms."""

    @property
    def name(self) -> str:
        """The name in prompts and logs: `layer 3`, `attention 3`, `mlp 3`."""
        return f"{self.kind} {self.layer}"

    @property
    def highest_rate(self) -> float:
        """The largest pruning rate that leaves a working unit."""
        return 1 - self.fewest / self.parameters


class ModelShape(Value):
    """Sizes of a decoder LLM and the parameters of each piece that pruning can remove.

    Pieces are query heads (rows of q_proj, columns of o_proj, biases), KV heads (rows of k_proj and v_proj) and MLP
    channels (a row of gate_proj and up_proj, a column of down_proj). The rest of a block (norms, output biases) is
    fixed.
    """

    family: str
    hidden_size: PositiveInt
    head_dim: PositiveInt
    layers: tuple[LayerShape, ...]
    query_head_parameters: PositiveInt
    kv_head_parameters: PositiveInt
    channel_parameters: PositiveInt
    attention_fixed: int
    mlp_fixed: int
    other_parameters: int
    """Parameters outside the decoder layers: embeddings, final norm, output head (tied weights counted once)."""

    @property
    def words(self) -> str:
        """The decoder's shape in a few words, by its first layer."""
        first = self.layers[0]
        like = "each" if len(set(self.layers)) == 1 else "the first"
        sizes = f"{first.query_heads} query heads and {first.kv_heads} KV heads of {self.head_dim}"
        return (
            f"{len(self.layers)} {self.family} layers of hidden size {self.hidden_size}, "
            f"{like} with {sizes} and {first.mlp_channels} MLP channels"
        )

    def same_decoder(self, other: "ModelShape") -> bool:
        """Whether the decoder layers are alike; embeddings and output head may differ."""
        return self.model_copy(update={"other_parameters": other.other_parameters}) == other

    def attention_parameters(self, query_heads: int, kv_heads: int) -> int:
        """Return the parameters of an attention block with these numbers of heads, its norm included."""
        return query_heads * self.query_head_parameters + kv_heads * self.kv_head_parameters + self.attention_fixed

    def mlp_parameters(self, channels: int) -> int:
        """Return the parameters of an MLP block with this number of channels, its norm included."""
        return channels * self.channel_parameters + self.mlp_fixed

    def layer_parameters(self, layer: int) -> int:
        """Return the parameters of decoder layer `layer` before pruning."""
        shape = self.layers[layer]
        return self.attention_parameters(shape.query_heads, shape.kv_heads) + self.mlp_parameters(shape.mlp_channels)

    @property
    def decoder_parameters(self) -> int:
        """Parameters of all decoder layers. β is a share of these."""
        return sum(self.layer_parameters(i) for i in range(len(self.layers)))

    @property
    def total_parameters(self) -> int:
        """All parameters, embeddings and output head included."""
        return self.decoder_parameters + self.other_parameters

    def units(self, granularity: Granularity) -> tuple[Unit, ...]:
        """Return the units that rates apply to: layers, or attention and MLP of each layer in turn."""
        if granularity == "layer":
            return tuple(
                Unit(
                    layer=i,
                    kind="layer",
                    parameters=self.layer_parameters(i),
                    fewest=self.attention_parameters(1, 1) + self.mlp_parameters(1),
                )
                for i in range(len(self.layers))
            )
        return tuple(self._blocks())

    def _blocks(self) -> Iterator[Unit]:
        for i, layer in enumerate(self.layers):
            yield Unit(
                layer=i,
                kind="attention",
                parameters=self.attention_parameters(layer.query_heads, layer.kv_heads),
                fewest=self.attention_parameters(1, 1),
            )
            yield Unit(
                layer=i,
                kind="mlp",
                parameters=self.mlp_parameters(layer.mlp_channels),
                fewest=self.mlp_parameters(1),
            )
