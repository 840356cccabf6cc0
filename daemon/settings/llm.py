"""Settings of the LLM: its endpoints, how it is asked, and the small one that `selfpruner run` serves itself."""

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt, SecretStr, model_validator

from agents.llm.policy import ChatPolicy
from agents.prompting.settings import AgentSettings
from daemon.settings.section import Section


def _http_url(url: str) -> str:
    """Return `url` if it can be an endpoint's; the error does not show it."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        whole = parts.scheme in ("http", "https") and host and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("it is not a URL such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc:
        raise ValueError("give the key as api_key_file or api_key, not in the URL")
    return url


def check_key(key: str) -> str:
    """Return `key` if a header can hold it; the error does not show it."""
    if re.match(r"(export )?[A-Z][A-Z0-9_]*=[^=]", key):
        raise ValueError("give the key alone, without a name and `=` before it")
    if not (key.isascii() and key.isprintable()):
        raise ValueError("a key is one line of ASCII characters")
    return key


def _secret_key(key: SecretStr) -> SecretStr:
    return SecretStr(check_key(key.get_secret_value()))


class EndpointSettings(Section):
    """An OpenAI-compatible endpoint."""

    base_url: Annotated[str, AfterValidator(_http_url)]
    """The endpoint's URL up to and including /v1, such as `http://127.0.0.1:8000/v1`."""
    model: str
    """The model's name at this endpoint, such as `Qwen/Qwen3-8B`."""
    api_key: Annotated[SecretStr, AfterValidator(_secret_key)] | None = None
    """API key, sent to this endpoint only. Prefer `api_key_file`."""
    api_key_file: Path | None = None
    """A file that holds the API key, such as a Docker or Kubernetes secret."""
    name: str | None = None
    """A unique name for logs and `status`; by default the URL's host, with the model's name if two endpoints share
    it."""
    context: PositiveInt | None = None
    """Context length in tokens, for prompt and reply together. By default, the length that the endpoint reports; some
    servers report none. If it is too short for the replies of llm.reply `lists`, the search is refused at the start."""
    grammar: bool = False
    """Constrain replies by a grammar, for llama.cpp's server only. This saves about half of a small model's tokens but
    leaves no room for reasoning. Other servers ignore the grammar silently, and their replies are then not constrained
    at all."""
    price_in: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens, for llm.budget_cost; use one currency for all endpoints."""
    price_out: float = Field(default=0.0, ge=0)
    """Price of a million completion tokens."""

    @model_validator(mode="after")
    def _has_one_key(self) -> "EndpointSettings":
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("give api_key or api_key_file, not both")
        return self


def _named_apart(endpoints: tuple[EndpointSettings, ...]) -> tuple[EndpointSettings, ...]:
    names = [endpoint.name for endpoint in endpoints if endpoint.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two endpoints have the name {name!r}")
    return endpoints


class _Endpoints(Section):
    """The first setting of the section: fields of a base are listed before those of its subclasses."""

    endpoints: Annotated[tuple[EndpointSettings, ...], AfterValidator(_named_apart)] = ()
    """LLM endpoints in order of preference; if one fails, the next is asked. If the list is empty, `selfpruner run`
    serves a small model itself."""


class LlmSettings(ChatPolicy, AgentSettings, _Endpoints):
    """The LLM that proposes candidates, and how it is asked."""

    start_wait_seconds: float = Field(default=600.0, ge=0)
    """Maximum seconds that questions wait at the start until an endpoint answers. After that, operators without an LLM
    propose. Candidates that need no answer are measured meanwhile."""
    lessons: Path | None = None
    """Experimental: a text file of what earlier searches found, such as `runs/llama.md` for models of one family. The
    Initializer tells the LLM what the file says, so search.initializer must be `llm`. At its end, the search adds one
    line. You can read and edit the file."""
    replay: Path | None = None
    """The transcript.jsonl of an earlier search. Replies are read from it, and no endpoint is asked."""
    replay_strict: bool = False
    """If a question is not in the transcript, end the search instead of using an operator without an LLM."""


class LocalLlmSettings(Section):
    """The small LLM that `selfpruner run` serves if llm.endpoints is empty."""

    gguf: str = "smollm2"
    """The model to serve: a GGUF file, or `smollm2`."""
    context: PositiveInt = 8192
    """Context length in tokens, shared by all slots."""
    slots: PositiveInt = 2
    """Number of questions answered in parallel."""
    threads: PositiveInt | None = None
    """Number of CPU threads; none means half of the cores, because the worker needs the others."""
