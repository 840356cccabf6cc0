"""The model profile of a search in Redis: workers publish it, the daemon reads it.

A profile belongs to one spec. If the search now has another spec than a worker, the worker publishes nothing. A reader
ignores the profile of another spec.
"""

from typing import Any

from redis.asyncio import Redis

from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import RedisRetry
from protocol.queue.keys import Keys, parse_stored, parse_unless_damaged
from protocol.queue.streams import load_scripts


class ProfileBoard:
    """Publishes and reads the profile of the search with these keys."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._retry = RedisRetry(redis, keys.profile)
        self._publish = load_scripts(redis)["publish_profile"]

    async def read(self, fingerprint: str) -> ModelProfile | None:
        """Return the published profile of the spec with this fingerprint, else None.

        A damaged profile counts as absent, because a worker publishes it again. Raises StoreError for a profile that
        another version wrote.
        """
        text = await self._retry(lambda: self._redis.get(self._keys.profile))
        profile = parse_unless_damaged(ModelProfile, text, self._keys.profile) if text else None
        return profile if profile and profile.fingerprint == fingerprint else None

    async def publish(self, profile: ModelProfile) -> ModelProfile | None:
        """Publish `profile` unless its spec already has one. Returns the profile that is then in Redis.

        Publishes nothing and returns None if the search now has another spec or no spec.
        """
        text = await self._retry(lambda: self._redis.get(self._keys.spec))
        # The spec may change before the script runs. Lua cannot compute a fingerprint, so the script compares the text.
        spec = parse_unless_damaged(SearchSpec, text, self._keys.spec) if text else None
        if spec is None or spec.fingerprint != profile.fingerprint:
            return None
        args = [text, profile.fingerprint, profile.model_dump_json()]
        published = await self._retry(lambda: self._publish([self._keys.spec, self._keys.profile], args))
        return parse_stored(ModelProfile, published, self._keys.profile) if published else None
