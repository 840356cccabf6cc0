"""Where the workers of a search publish its model profile, and where the daemon finds it.

A profile counts for one spec. A worker that prepared a spec which the search no longer has publishes nothing,
and the profile of another spec is as good as none.
"""

from typing import Any

from redis.asyncio import Redis

from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import Patience
from protocol.queue.keys import Keys, read_entry, read_stored
from protocol.queue.streams import load_scripts


class ProfileBoard:
    """The profile of the search with these keys."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._patiently = Patience(redis, keys.profile)
        self._publish = load_scripts(redis)["publish_profile"]

    async def read(self, fingerprint: str) -> ModelProfile | None:
        """The profile of the spec with this fingerprint, once it is published; StoreError for another version's.

        One that is damaged is as good as none: a worker publishes it again.
        """
        text = await self._patiently(lambda: self._redis.get(self._keys.profile))
        profile = read_entry(ModelProfile, text, self._keys.profile) if text else None
        return profile if profile and profile.fingerprint == fingerprint else None

    async def publish(self, profile: ModelProfile) -> ModelProfile | None:
        """Publish `profile` unless another one of its spec is there; returns the one that counts.

        None where the search has another spec by now, or none: then nothing is published.
        """
        text = await self._patiently(lambda: self._redis.get(self._keys.spec))
        # The script compares the text, for it cannot tell a fingerprint: the spec may change between the two steps.
        spec = read_entry(SearchSpec, text, self._keys.spec) if text else None
        if spec is None or spec.fingerprint != profile.fingerprint:
            return None
        args = [text, profile.fingerprint, profile.model_dump_json()]
        counts = await self._patiently(lambda: self._publish([self._keys.spec, self._keys.profile], args))
        return read_stored(ModelProfile, counts, self._keys.profile) if counts else None
