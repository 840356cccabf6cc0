"""Checks the sizes in a config before a model is built, because transformers trusts every number in the file."""

from collections.abc import Iterator, Mapping
from typing import Any

from gpu_worker.models.errors import quoted
from protocol.errors import ModelError

MAX_SIZES = {
    "num_hidden_layers": 1_000,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**13,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "num_labels": 2**16,
}
"""Maximum of each size, about eight times the size of the largest models. A size may be null if transformers has a
default for it. Building a model of 1,000 layers without weights takes half a second. `num_labels` is not used here, but
transformers builds a table of this many labels."""
MAX_NUMBER = 3.4e38
"""Limit for all other numbers: the maximum of float32. `rope_theta` may be 45 billion, and 1e30 may mean "no limit"."""


def check_numbers(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError if any number in a config is not finite or exceeds MAX_NUMBER."""
    waiting: list[tuple[str, object]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
        elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:  # NaN fails this too
            raise ModelError(f"the config of {name!r} has {quoted(key)} {quoted(value)}, which is not a valid number")


def check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError for impossible sizes in `config`, the config of the model `name`."""
    per_layer = config.get("per_layer_config") or {}
    if not isinstance(per_layer, Mapping):
        raise ModelError(f"the config of {name!r} has per_layer_config {quoted(per_layer)}, which must be an object")
    for sizes in (config, *per_layer.values()):
        if not isinstance(sizes, Mapping):
            raise ModelError(f"the config of {name!r} has {quoted(sizes)} for a layer, which must be an object")
        _check_each(name, sizes)
        query, kv = (sizes.get(key) or config.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
        if query and kv and query % kv:
            raise ModelError(f"the config of {name!r} has {kv} KV heads, which cannot share {query} query heads evenly")
    for share in _rotated_shares(config):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ModelError(
                f"the config of {name!r} has partial_rotary_factor {quoted(share)}, which must be above 0 and at most 1"
            )


def _check_each(name: str, sizes: Mapping[str, Any]) -> None:
    for key, most in MAX_SIZES.items():
        size = sizes.get(key)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most):
            raise ModelError(
                f"the config of {name!r} has {key} {quoted(size)}, which must be an integer from 1 to {most:,}"
            )


def _rotated_shares(config: Mapping[str, Any]) -> Iterator[object]:
    """Yield every `partial_rotary_factor` in the config; transformers allocates memory for any value."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    parts = [config, rope, *(rope.values() if isinstance(rope, Mapping) else ())]
    for part in parts:
        if isinstance(part, Mapping) and part.get("partial_rotary_factor") is not None:
            yield part["partial_rotary_factor"]
