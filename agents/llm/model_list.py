"""The body of `GET /v1/models` -> the models of an endpoint, with the tokens of their contexts. Pure."""

from typing import Any

from agents.llm.bodies import read_json

LONGEST_NAME = 1_000
"""Characters; a longer name is passed over."""
LARGEST_CONTEXT = 10**9
"""Tokens; a larger context is not believed."""
_CONTEXTS = ("max_model_len", "context_length", "context_window", "n_ctx")
"""What servers call the tokens of a model's context in their list: vLLM, routers, llama.cpp (under `meta`)."""
_TRAINED_CONTEXT = "n_ctx_train"
"""What llama.cpp says of the model itself; it may be served with more, or with less."""


def read_models(body: bytes) -> dict[str, int | None]:
    """Return the names in the list, each with its context where one is given; nothing where this is no list."""
    try:
        reply = read_json(body)
    except ValueError:
        return {}
    models = reply.get("data") if isinstance(reply, dict) else None
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    return {entry["id"]: _context(entry) for entry in entries if _is_name(entry.get("id"))}


def _is_name(found: object) -> bool:
    return isinstance(found, str) and len(found) <= LONGEST_NAME


def _context(entry: dict[str, Any]) -> int | None:
    """Tokens of the context of a listed model: the least that it is served with, or else what it was trained with."""
    said = [source for source in (entry, entry.get("meta")) if isinstance(source, dict)]
    for names in (_CONTEXTS, (_TRAINED_CONTEXT,)):
        numbers = [source.get(name) for source in said for name in names]
        if found := [n for n in numbers if isinstance(n, int) and 1 < n <= LARGEST_CONTEXT]:  # True is an int, too
            return min(found)
    return None
