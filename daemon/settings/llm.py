"""The settings of the LLM: its endpoints, how it is asked, and the small one that `selfpruner run` serves itself."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, SecretStr, model_validator

from agents.prompting.settings import FeedbackPart
from daemon.settings.section import Section


def _http_url(url: str) -> str:
    """Return `url` if it may be an endpoint's; the error does not show it."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        whole = parts.scheme in ("http", "https") and host and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("it is no URL such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc:
        raise ValueError("give the key as api_key_file or api_key, not in the URL")
    return url


def check_key(key: str) -> str:
    """Return `key` if a header can hold it; the error does not show it."""
    if not (key.isascii() and key.isprintable()):
        raise ValueError("a key is one line of ASCII characters")
    return key


def _secret_key(key: SecretStr) -> SecretStr:
    return SecretStr(check_key(key.get_secret_value()))


class EndpointSettings(Section):
    """An OpenAI-compatible endpoint."""

    base_url: Annotated[str, AfterValidator(_http_url)]
    """Up to and including /v1."""
    model: str
    """The model's name at this endpoint."""
    api_key: Annotated[SecretStr, AfterValidator(_secret_key)] | None = None
    """Its key; sent to this endpoint only. Better given as `api_key_file`."""
    api_key_file: Path | None = None
    """A file with the key (a Docker or Kubernetes secret)."""
    name: str | None = None
    """As logs and `status` call it, each another; the URL's host where left out, with the model where two share it."""
    context: PositiveInt | None = None
    """Tokens of its context, question and answer together; as it says itself where left out, which not every server
    does. `lists` too long for it are refused."""
    grammar: bool = False
    """It is llama.cpp's server: the form of answers is sent as a grammar, which leaves no room for blanks (half of a
    small model's tokens) nor for thinking beforehand, and holds decimals to their range. Other servers ignore it
    without a word, and are then asked for no form at all."""
    price_in: float = Field(default=0.0, ge=0)
    """Of a million tokens asked, in any currency, the same for all endpoints; for llm.budget_cost."""
    price_out: float = Field(default=0.0, ge=0)
    """Of a million tokens answered."""

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


class LlmSettings(Section):
    """The LLM that runs the search, and how it is asked."""

    endpoints: Annotated[tuple[EndpointSettings, ...], AfterValidator(_named_apart)] = ()
    """Asked in this order, the next when one fails. Empty: `selfpruner run` serves a small model itself."""
    reply: Literal["lists", "edits", "trades"] = "lists"
    """`lists`: whole configurations (the paper). `edits`: small changes. `trades`: choices of a ranked menu."""
    tell: tuple[FeedbackPart, ...] = ("sensitivity", "lessons")
    """What prompts say beside the configurations: of `sensitivity`, `weakest`, `contrast` and `lessons`."""
    proposals_per_call: PositiveInt | None = None
    """Candidates asked for in one call; none means all at once for `lists`, else one."""
    reasks: int = Field(default=2, ge=0, le=10)
    """How often a bad reply is answered with what was wrong before the classical operator stands in."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Of the LLM's sampling."""
    max_tokens: PositiveInt = 4096
    """At most so many tokens in one reply."""
    attempts: PositiveInt = 4
    """HTTP attempts of one question at one endpoint."""
    deadline_seconds: PositiveFloat = 300.0
    """For one question, retries included."""
    max_reply_bytes: PositiveInt = 1_000_000
    """A longer HTTP reply is cut off and refused."""
    concurrency: PositiveInt = 4
    """Questions under way at once."""
    failures_to_open: PositiveInt = 4
    """After so many requests in a row without an answer an endpoint is left alone."""
    rest_seconds: PositiveFloat = 30.0
    """For how long; then one question tries it, and each such trial that fails doubles the rest, up to ten minutes."""
    start_wait_seconds: float = Field(default=600.0, ge=0)
    """How long the start waits for an endpoint that answers; then the search begins, with the classical operators."""
    budget_requests: PositiveInt | None = None
    """HTTP requests that the search may make, over all restarts; then the classical operators take over."""
    budget_tokens: PositiveInt | None = None
    """Tokens, of questions and answers together, that the search may use."""
    budget_cost: PositiveFloat | None = None
    """What it may cost, in the currency of the endpoints' price_in and price_out."""
    replay: Path | None = None
    """A transcript.jsonl: answers are taken from it, and no endpoint is asked."""
    replay_strict: bool = False
    """End the search at a question that the transcript does not hold; else the classical operator stands in."""


class LocalLlmSettings(Section):
    """The small LLM that `selfpruner run` serves where llm.endpoints is empty."""

    gguf: str = "smollm2"
    """A GGUF file, or `smollm2`."""
    context: PositiveInt = 8192
    """Tokens of context, shared by the parallel slots."""
    slots: PositiveInt = 2
    """Questions answered at once."""
    threads: PositiveInt | None = None
    """CPU threads; none means half of the cores, for the worker needs the others."""
