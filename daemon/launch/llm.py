"""The LLM of a search from its settings: endpoints with their keys, policy, budget, transcripts."""

import json
from collections.abc import Sequence
from errno import ENOENT
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
from pydantic import SecretStr

from agents.llm.endpoint import Endpoint
from agents.llm.policy import Spent
from agents.llm.replay import Replay, Transcript
from daemon.settings.llm import EndpointSettings, LlmSettings, check_key
from daemon.settings.settings import Settings
from daemon.state.journal import TRANSCRIPT
from protocol.errors import SettingsError
from protocol.queue.connection import password_of
from protocol.runtime.paths import expanded
from protocol.runtime.secret_files import read_secret

if TYPE_CHECKING:
    from agents.llm.chat import Chat, Record
    from agents.llm.connection import Gate

LONGEST_LINE = 16_000_000
"""Maximum number of characters read as one line of a transcript. Self-Pruner writes no longer lines, and the pieces of
a longer line are ignored."""

log = structlog.get_logger()


def make_chat(
    llm: LlmSettings, endpoints: Sequence[EndpointSettings], *, gate: "Gate", record: "Record", spent: Spent
) -> "Chat":
    """Return the chat for these endpoints, or for no endpoint with llm.replay. `spent` is the LLM usage so far."""
    from agents.llm.chat import Chat  # imports openai, which takes longer to load than the rest of a command

    asked = [] if llm.replay else make_endpoints(endpoints)
    return Chat(asked, llm, gate=gate, record=record, spent=spent)


def make_endpoints(settings: Sequence[EndpointSettings]) -> list[Endpoint]:
    """Return the endpoints with unique names and with their keys, read from files if necessary."""
    return [
        Endpoint(
            name=name,
            base_url=endpoint.base_url,
            model=endpoint.model,
            api_key=_key(endpoint),
            price_in=endpoint.price_in,
            price_out=endpoint.price_out,
            context=endpoint.context,
            grammar=endpoint.grammar,
        )
        for name, endpoint in zip(_names(settings), settings, strict=True)
    ]


def _names(settings: Sequence[EndpointSettings]) -> list[str]:
    """Return unique names: the given one, else the host, with the model and a number if needed.

    Totals, logs and metrics use these names.
    """
    hosts = [endpoint.name or _host(endpoint.base_url) for endpoint in settings]
    names: list[str] = [endpoint.name or "" for endpoint in settings]
    for i, endpoint in enumerate(settings):
        if not names[i]:
            host = hosts[i] if hosts.count(hosts[i]) == 1 else f"{hosts[i]}/{endpoint.model}"
            free = (name for n in count(1) if (name := host if n == 1 else f"{host}#{n}") not in names)
            names[i] = next(free)
    return names


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _key(settings: EndpointSettings) -> SecretStr | None:
    if settings.api_key_file is None:
        return settings.api_key
    # A deployment always mounts the file; it is empty for an endpoint without a key.
    return SecretStr(text) if (text := _read_key(settings.api_key_file)) else None


def secrets_of(settings: Settings) -> list[str]:
    """Return all secret values of the settings, for redaction in the log."""
    keys = [_key(endpoint) for endpoint in settings.llm.endpoints]
    url = settings.redis.full_url
    return [key.get_secret_value() for key in keys if key] + (password_of(url) if url else [])


def read_replay(settings: Settings) -> Replay | None:
    """Return the transcript that replaces the endpoints, or None if llm.replay is not set. Raises SettingsError."""
    llm = settings.llm
    if llm.replay is None:
        return None
    if expanded(llm.replay).resolve() == (settings.folder / TRANSCRIPT).resolve():
        raise SettingsError("llm.replay is this search's own transcript: give this one another search.name")
    return Replay(read_transcript(llm.replay), strict=llm.replay_strict)


def read_transcript(path: Path) -> Transcript:
    """Read a transcript, ignoring lines cut off by a kill. Raises SettingsError if it cannot be read."""
    transcript, torn = Transcript(), 0
    try:
        if not expanded(path).is_file():  # a device or a pipe may have no end
            raise FileNotFoundError(ENOENT, "it is not a file")
        with expanded(path).open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(LONGEST_LINE):
                try:
                    transcript.add(json.loads(line))
                except (ValueError, RecursionError):
                    torn += 1
    except OSError as error:
        raise SettingsError(f"the transcript {str(path)!r} cannot be read: {error.strerror}") from error
    if torn:
        log.info("transcript_lines_torn", file=str(path), lines=torn)
    return transcript


def _read_key(path: Path) -> str:
    try:
        return check_key(read_secret(path))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"llm.endpoints: the key file {str(path)!r} cannot be read: {why}") from None
