"""From the size that a pruned model may have to the pruning rate that reaches it; no weights are loaded."""

import math

import torch

from gpu_worker.models.loading import load_without_weights
from gpu_worker.models.memory import kv_cache_bytes
from gpu_worker.models.published import published_decoder
from protocol.errors import ModelError, SettingsError
from protocol.plans.rates import DECIMALS, HIGHEST_RATE
from protocol.plans.shape import ModelShape
from protocol.plans.size import Size
from protocol.plans.spec import Dtype


def shape_of(model: str, dtype: Dtype) -> ModelShape:
    """Return the shape of a model, also of a well-known one that is not on this machine. Raises ModelError."""
    try:
        return load_without_weights(model, dtype).decoder.shape
    except ModelError:
        if published := published_decoder(model, dtype):
            return published[0].shape
        raise


def rate_for(size: Size, model: str, dtype: Dtype, multiple_of: int) -> float:
    """Return the lowest pruning rate with which no plan of `model` is larger than `size`.

    Raises SettingsError with one sentence if the size cannot be reached, or if the model is that small already.
    """
    shape = shape_of(model, dtype)
    most = parameters_in(size, shape, dtype)
    whole, decoder = shape.total_parameters, shape.decoder_parameters
    if whole <= most:
        raise SettingsError(
            f"{size.words} is not smaller than the model, which has {_words(size, whole, shape, dtype)}"
        )
    # A plan removes its share to within one step of the MLP's width.
    to_remove = whole - most + multiple_of * shape.channel_parameters
    rate: float = math.ceil(to_remove / decoder * 10**DECIMALS) / 10**DECIMALS
    if rate > HIGHEST_RATE:
        least = whole - int(HIGHEST_RATE * decoder) + multiple_of * shape.channel_parameters
        raise SettingsError(
            f"{size.words} cannot be reached: with {HIGHEST_RATE:.0%} of the decoder removed, the model still has "
            f"{_words(size, least, shape, dtype)}"
        )
    return rate


def parameters_in(size: Size, shape: ModelShape, dtype: Dtype) -> int:
    """Return how many parameters `size` has room for."""
    if size.parameters is not None:
        return size.parameters
    assert size.memory is not None, "a size is one of the two"
    return (size.memory - cache_bytes(size, shape, dtype)) // _item_bytes(dtype)


def cache_bytes(size: Size, shape: ModelShape, dtype: Dtype) -> int:
    """Return the bytes of the dense model's KV cache, which is at least as large as a pruned model's."""
    return size.batch * kv_cache_bytes(shape, _item_bytes(dtype), size.context)


def _item_bytes(dtype: Dtype) -> int:
    return int(getattr(torch, dtype).itemsize)


def _words(size: Size, parameters: int, shape: ModelShape, dtype: Dtype) -> str:
    """Describe a model with so many parameters in the unit of `size`."""
    if size.parameters is not None:
        return f"{parameters:,} parameters"
    cache = cache_bytes(size, shape, dtype)
    weights = f"{parameters * _item_bytes(dtype) / 1e6:,.0f} MB of weights"
    return f"{weights} and up to {cache / 1e6:,.0f} MB of KV cache" if cache else weights
