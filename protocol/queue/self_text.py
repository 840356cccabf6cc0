"""Text that the target model wrote itself, as tokens that travel: every worker of a search has to measure on the same.

Sampling is not the same on two machines, so the first worker to have written publishes, and all others take that.
"""

import base64
import binascii
import zlib
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt
from redis.asyncio import Redis

from protocol.errors import StoreError
from protocol.queue.connection import Patience
from protocol.queue.keys import Keys, is_damaged

TOKEN_BYTES = 4
LARGEST_BYTES = 32 * 1024 * 1024
"""Of tokens, eight million of them; packed they are about half of it. A larger text does not travel."""


class SelfText(BaseModel):
    """Tokens of `windows` texts of `length` tokens each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: PositiveInt
    length: PositiveInt
    packed: str
    """The tokens as little-endian 32-bit integers, compressed (zlib), in base64."""

    @classmethod
    def pack(cls, windows: int, length: int, tokens: bytes) -> "SelfText | None":
        """`tokens` packed; None where they are too many to travel."""
        assert len(tokens) == windows * length * TOKEN_BYTES
        if len(tokens) > LARGEST_BYTES:
            return None
        return cls(windows=windows, length=length, packed=base64.b64encode(zlib.compress(tokens)).decode())

    def unpack(self) -> bytes:
        """The tokens, windows × length × 4 bytes. Raises StoreError where they are not that many."""
        size = self.windows * self.length * TOKEN_BYTES
        try:
            packed = base64.b64decode(self.packed, validate=True)
            tokens = zlib.decompressobj().decompress(packed, min(size, LARGEST_BYTES) + 1)
        except (binascii.Error, zlib.error) as error:
            raise StoreError(f"the published text of the model cannot be read: {error}") from error
        if len(tokens) != size:
            raise StoreError(f"the published text of the model is not of {self.windows} × {self.length} tokens")
        return tokens


class SelfTextBoard:
    """Where the workers of a search publish the text of a spec's model, each as the JSON of a SelfText."""

    def __init__(self, redis: Redis, keys: Keys, fingerprint: str) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._key = keys.self_text(fingerprint)
        self._patiently = Patience(redis, self._key)

    async def read(self) -> str | None:
        """What is published; None where nothing is, or where it is damaged."""
        text: str | None = await self._patiently(lambda: self._redis.get(self._key))
        return None if text is None or is_damaged(text) else text

    async def publish(self, text: str) -> str:
        """Publish `text` unless another worker was first; returns the one that counts."""
        if not await self._patiently(lambda: self._redis.set(self._key, text, nx=True)) and await self.read() is None:
            await self._patiently(lambda: self._redis.set(self._key, text))
        return await self.read() or text
