"""The LLM of a search, from its settings: endpoints with their keys, policy, budget, and the agents that ask."""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from pydantic import SecretStr

from agents.asking import Asks
from agents.budget import Budget, Spent
from agents.chat import Chat, Record
from agents.connection import Gate
from agents.crossover import Crossover
from agents.endpoint import ChatPolicy, Endpoint
from agents.initializer import Initializer
from agents.mutator import Mutator
from agents.prompt import Prompts
from agents.replay import Replay, Transcript
from agents.selector import Selector
from agents.settings import AgentSettings
from daemon.journal import TRANSCRIPT
from daemon.search import Agents
from daemon.settings import EndpointSettings, LlmSettings, Settings
from protocol.connection import password_of
from protocol.errors import SettingsError

log = structlog.get_logger()


def make_chat(
    llm: LlmSettings, endpoints: Sequence[EndpointSettings], *, gate: Gate, record: Record, spent: Spent
) -> Chat:
    """What asks these endpoints; none where the answers are a transcript's. `spent` is what has been spent so far."""
    policy = ChatPolicy(
        attempts=llm.attempts,
        deadline=llm.deadline_seconds,
        byte_cap=llm.max_reply_bytes,
        concurrency=llm.concurrency,
        failures_to_open=llm.failures_to_open,
        rest=llm.rest_seconds,
    )
    budget = Budget(requests=llm.budget_requests, tokens=llm.budget_tokens, cost=llm.budget_cost)
    asked = [] if llm.replay else [make_endpoint(endpoint) for endpoint in endpoints]
    return Chat(asked, policy, gate=gate, record=record, budget=budget, spent=spent)


def make_agents(llm: LlmSettings, chat: Asks) -> Agents:
    """The four agents that ask this LLM."""
    settings = AgentSettings(
        reply=llm.reply,
        proposals_per_call=llm.proposals_per_call,
        reasks=llm.reasks,
        temperature=llm.temperature,
        max_tokens=llm.max_tokens,
    )
    prompts = Prompts()
    return Agents(
        initializer=Initializer(chat, prompts, settings),
        selector=Selector(chat, prompts, settings),
        mutator=Mutator(chat, prompts, settings),
        crossover=Crossover(chat, prompts, settings),
    )


def make_endpoint(settings: EndpointSettings) -> Endpoint:
    """The endpoint with its key, read from its file where it has one."""
    key = settings.api_key
    if settings.api_key_file is not None:
        # A deployment mounts the file in any case; an empty one is for an endpoint that wants no key.
        key = SecretStr(text) if (text := _read_key(settings.api_key_file)) else None
    url = urlsplit(settings.base_url)  # which may hold a password, and then the name must not
    name = settings.name or (f"{url.hostname}:{url.port}" if url.port else str(url.hostname))
    return Endpoint(
        name=name,
        base_url=settings.base_url,
        model=settings.model,
        api_key=key,
        price_in=settings.price_in,
        price_out=settings.price_out,
    )


def secrets_of(settings: Settings) -> list[str]:
    """Every secret value in the settings, for the log's redaction."""
    keys = [make_endpoint(e).api_key for e in settings.llm.endpoints]
    urls = [settings.redis.full_url or "", *(e.base_url for e in settings.llm.endpoints)]
    passwords = [password for url in urls for password in password_of(url)]
    return [key.get_secret_value() for key in keys if key] + passwords


def read_replay(settings: Settings) -> Replay | None:
    """What answers in place of endpoints, where llm.replay is set; raises SettingsError."""
    llm = settings.llm
    if llm.replay is None:
        return None
    if llm.replay.expanduser().resolve() == (settings.folder / TRANSCRIPT).resolve():
        raise SettingsError("llm.replay is this search's own transcript: give this one another search.name")
    return Replay(read_transcript(llm.replay), strict=llm.replay_strict)


def read_transcript(path: Path) -> Transcript:
    """The transcript in a file; lines that a kill has torn are passed over. Raises SettingsError without a file."""
    transcript, torn = Transcript(), 0
    try:
        with path.expanduser().open(encoding="utf-8", errors="replace") as file:
            for line in file:
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
        return path.expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"llm.endpoints: the key file {str(path)!r} cannot be read: {error.strerror}") from error
