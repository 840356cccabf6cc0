"""Hostile replies of an LLM endpoint, as data; tests/support/hostile_server.py sends them.

`KINDS` holds every kind, `BY_NAME` finds one. `make(rng, request)` returns the bytes of a whole response (or of
something that is no HTTP) from a random generator and the bytes of the request; `how` says how the server sends them.
"""

from tests.support.hostile_bodies import WAITS, add_bodies, odd_date
from tests.support.hostile_parts import BY_NAME, KINDS, Hostile, How, as_json, completion, http
from tests.support.hostile_wire import add_wire

__all__ = ["BY_NAME", "KINDS", "WAITS", "Hostile", "How", "as_json", "completion", "http", "odd_date"]

add_wire()
add_bodies()
