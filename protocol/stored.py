"""Reading values of ours back from Redis, where anybody may have written."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from protocol.errors import StoreError

M = TypeVar("M", bound=BaseModel)


def read_stored(model: type[M], text: str, key: str) -> M:
    """The value that `text`, found under `key`, stands for; StoreError where it is none that this version knows."""
    try:
        return model.model_validate_json(text)
    except ValidationError:
        raise StoreError(
            f"what stands under {key} in Redis cannot be read: another version, or somebody by hand, has written it"
        ) from None
