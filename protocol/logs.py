"""structlog for every process: readable lines on a terminal, one JSON object a line elsewhere, no secret in either."""

import logging
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import Processor

HIDDEN = "***"
_SECRET_NAME = re.compile(r"(api_?key|authorization|token$|password|secret)", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^\s/:@]*):[^\s/@]+@")


class Redaction:
    """A processor that blanks secrets: by the name of a field, by configured value, and passwords in URLs."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({s for s in secrets if len(s) >= 4}, key=len, reverse=True)

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        """The event without its secrets."""
        return {
            key: HIDDEN if _SECRET_NAME.search(key) and isinstance(value, str) else self._clean(value)
            for key, value in event.items()
        }

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, HIDDEN)
            return _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", value)
        if isinstance(value, Mapping):
            return {k: HIDDEN if _SECRET_NAME.search(str(k)) else self._clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(v) for v in value]
        return value


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the moment, so that a live display may redirect it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure(
    *,
    file: Path | None = None,
    console: bool = True,
    json_lines: bool | None = None,
    level: str = "INFO",
    secrets: Iterable[str] = (),
) -> None:
    """Set up logging for this process, for structlog and for libraries that use the standard module.

    `json_lines` None means: readable on a terminal, JSON elsewhere. `file` gets JSON lines appended, whatever the
    console shows. A process with neither is silent. Everything goes to stderr; stdout belongs to a command's answer.
    """
    redact = Redaction(secrets)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    as_json: list[Processor] = [
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
        redact,
        structlog.processors.JSONRenderer(ensure_ascii=False, allow_nan=False, default=str),
    ]
    as_text: list[Processor] = [
        redact,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback, pad_event_to=24),
    ]
    if json_lines is None:
        json_lines = not sys.stderr.isatty()
    handlers: list[logging.Handler] = []
    if console:
        handlers.append(_handler(_CurrentStderr(), as_json if json_lines else as_text, shared))
    if file is not None:
        handlers.append(_handler(logging.FileHandler(file, encoding="utf-8"), as_json, shared))
    logging.basicConfig(handlers=handlers, level=level, force=True)
    for chatty in ("httpx", "httpcore", "openai", "asyncio", "urllib3", "filelock", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _handler(handler: logging.Handler, rendering: list[Processor], shared: list[Processor]) -> logging.Handler:
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
            foreign_pre_chain=shared,
        )
    )
    return handler
