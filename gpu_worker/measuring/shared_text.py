"""The model's own text, the same for all workers of a search: taken from the first who wrote it, or offered to them."""

from collections.abc import Callable

import numpy
import structlog
import torch
from pydantic import ValidationError
from torch import Tensor

from protocol.errors import StoreError
from protocol.queue.self_text import SelfText

log = structlog.get_logger()

Offer = Callable[[str], str]
"""The JSON of the text that this worker wrote -> that of the one that counts."""


class SharedText:
    """`published` is the JSON of what the first worker wrote, None where nobody has yet; then `offer` is called."""

    def __init__(self, published: str | None, offer: Offer) -> None:
        self._published = published
        self._offer = offer

    def __call__(self, windows: int, length: int, write: Callable[[], Tensor]) -> Tensor:
        """The tokens (long, [windows, length]) that count; `write` makes them where they are not there yet.

        Raises StoreError where what is published is no such text.
        """
        if self._published is not None:
            return _tokens(self._published, windows, length)
        written = write()
        packed = SelfText.pack(windows, length, written.numpy().astype("<i4").tobytes())
        if packed is None:
            log.warning("self_text_too_long_to_share", windows=windows, length=length)
            return written
        return _tokens(self._offer(packed.model_dump_json()), windows, length)


def _tokens(published: str, windows: int, length: int) -> Tensor:
    try:
        text = SelfText.model_validate_json(published)
    except ValidationError as error:
        raise StoreError("the published text of the model was written by another version") from error
    if (text.windows, text.length) != (windows, length):
        raise StoreError(
            f"the published text of the model has {text.windows} windows of {text.length} tokens, "
            f"where {windows} of {length} are needed"
        )
    tokens = numpy.frombuffer(text.unpack(), dtype="<i4").astype(numpy.int64)
    return torch.from_numpy(tokens).view(windows, length)
