"""Where the workers of a search publish its model card, and where the daemon finds it.

A card counts for one spec. A worker that made its model ready for a spec that the search has no more publishes nothing,
and the card of another spec is as good as none.
"""

from typing import Any

from redis.asyncio import Redis

from protocol.plans.card import ModelCard
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import Patience
from protocol.queue.keys import Keys, read_entry, read_stored
from protocol.queue.streams import load_scripts


class CardBoard:
    """The card of the search with these keys."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._patiently = Patience(redis, keys.card)
        self._publish = load_scripts(redis)["publish_card"]

    async def read(self, fingerprint: str) -> ModelCard | None:
        """The card of the spec with this fingerprint, once it is published; StoreError for another version's.

        One that is damaged is as good as none: a worker publishes it again.
        """
        text = await self._patiently(lambda: self._redis.get(self._keys.card))
        card = read_entry(ModelCard, text, self._keys.card) if text else None
        return card if card and card.fingerprint == fingerprint else None

    async def publish(self, card: ModelCard) -> ModelCard | None:
        """Publish `card` unless another one of its spec is there; returns the one that counts.

        None where the search has another spec by now, or none: then nothing is published.
        """
        text = await self._patiently(lambda: self._redis.get(self._keys.spec))
        # The script compares the text, for it cannot tell a fingerprint: the spec may change between the two steps.
        spec = read_entry(SearchSpec, text, self._keys.spec) if text else None
        if spec is None or spec.fingerprint != card.fingerprint:
            return None
        args = [text, card.fingerprint, card.model_dump_json()]
        counts = await self._patiently(lambda: self._publish([self._keys.spec, self._keys.card], args))
        return read_stored(ModelCard, counts, self._keys.card) if counts else None
