"""Reading values of ours back from Redis, where anybody may have written."""

import json
from typing import Any, TypeVar, overload

from pydantic import BaseModel, TypeAdapter, ValidationError

from protocol.errors import StoreError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@overload
def read_stored(model: type[M], text: str, key: str) -> M: ...
@overload
def read_stored(model: TypeAdapter[T], text: str, key: str) -> T: ...
def read_stored(model: type[BaseModel] | TypeAdapter[Any], text: str, key: str) -> Any:
    """The value that `text`, found under `key`, stands for; StoreError where it is none that this version knows."""
    try:
        return model.validate_json(text) if isinstance(model, TypeAdapter) else model.model_validate_json(text)
    except ValidationError:
        raise StoreError(
            f"what stands under {key} in Redis cannot be read: another version, or somebody by hand, has written it"
        ) from None


def read_entry(model: type[M] | TypeAdapter[T], text: str, key: str) -> M | T | None:
    """As `read_stored`, but None for what no version of ours has written: no JSON object, or no UTF-8."""
    try:
        return read_stored(model, text, key)
    except StoreError:
        if is_damaged(text):
            return None
        raise


def is_damaged(text: str) -> bool:
    """Whether a value that cannot be read is damaged, where it could be another version's."""
    try:
        return "\ufffd" in text or not isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return True
