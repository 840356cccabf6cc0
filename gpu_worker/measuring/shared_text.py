"""Makes all workers of a search use the same model-written text: that of the first worker to publish it."""

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
"""JSON of the text that this worker wrote -> JSON of the published text."""


class SharedText:
    """Returns the published text, or offers a new one.

    `published` is the JSON of the first worker's text, None if no worker has published one; then `offer` is called.
    """

    def __init__(self, published: str | None, offer: Offer) -> None:
        self._published = published
        self._offer = offer

    def __call__(self, windows: int, length: int, write: Callable[[], Tensor]) -> Tensor:
        """Return the published tokens (long, [windows, length]); call `write` if none are published.

        Raises StoreError if the published text has another version or size.
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
