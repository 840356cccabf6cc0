"""structlog for every process: readable lines on a terminal, one JSON object a line elsewhere, no secret in either."""

import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

from protocol.runtime.files import Lines

HIDDEN = "***"
CHATTY = ("httpx", "httpx2", "httpcore", "openai", "asyncio", "urllib3", "filelock", "aiohttp.access")
"""Libraries whose lines below a warning are left out."""
_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]
"""For our own lines and for those of libraries."""
_SECRET_NAME = re.compile(r"(api_?key|authorization|token$|password|secret)", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^\s/:@]*):[^\s/]+@")


_DEEPEST = 20
"""Levels of nesting that a log line shows; what refers to itself ends there."""


class Redaction:
    """A processor that leaves only what JSON holds, and no secret in it.

    Secrets are blanked by the name of a field, by configured value, and as passwords in URLs. Numbers that JSON does
    not know (NaN) and objects become text first, so that neither breaks a line nor carries a secret past.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({s for s in secrets if len(s) >= 4}, key=len, reverse=True)

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        """The event without its secrets."""
        # The console prints a traceback from the exception itself; it is blanked in the line that comes out.
        return {key: value if key == "exc_info" else self._field(key, value, _DEEPEST) for key, value in event.items()}

    def text(self, text: str) -> str:
        """`text` without its secrets, and fit to be written."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text).encode("utf-8", "backslashreplace").decode()

    def _field(self, name: str, value: Any, depth: int) -> Any:
        if _SECRET_NAME.search(name) and value is not None and not isinstance(value, bool):
            return HIDDEN
        return self._clean(value, depth)

    def _clean(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if depth == 0:
            return "…"
        if isinstance(value, Mapping):
            return {self.text(str(k)): self._field(str(k), v, depth - 1) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._clean(v, depth - 1) for v in value]
        return self.text(str(value))


class _LogFile(logging.Handler):
    """A file that the processes of a search share. The console reports a full disk, and later the lost lines.

    A file that was removed is there again with the next line, and with the lines that it had, if it was not long; where
    it was moved, as logrotate does, a new one is begun.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._lines = Lines(path, shared=True)
        self._missing = 0
        self._was_removed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record, or count it as missing."""
        try:
            if self._lines.is_moved:
                self._lines.reopen()
            elif self._lines.is_gone:
                self._was_removed |= self._lines.restore()
            self._lines.append(self.format(record) + "\n")
        except OSError as error:
            self._missing += 1
            if self._missing == 1:  # and our own line, which comes back here, is the second
                structlog.get_logger().error("log_not_written", file=str(self._path), error=str(error))
        except Exception:  # noqa: BLE001  (as every handler of the standard library)
            self.handleError(record)
        else:
            if missing := self._missing:
                self._missing = 0
                structlog.get_logger().warning("log_lines_missing", file=str(self._path), lines=missing)
            if self._was_removed:
                self._was_removed = False
                kept = not self._lines.lost
                structlog.get_logger().warning("log_removed", file=str(self._path), lines_kept=kept)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
        super().close()


Stream = Literal["stdout", "stderr"]


class _CurrentStream(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr (or stdout) is at the moment, so that a live display may redirect it."""

    def __init__(self, name: Stream) -> None:
        logging.Handler.__init__(self)
        self._name = name

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        stream: TextIO = getattr(sys, self._name)
        return stream


def service_stream() -> Stream:
    """Where a service (daemon, worker) logs: stdout, where nothing else is said, or a terminal's stderr."""
    return "stderr" if sys.stderr.isatty() else "stdout"


def configure(
    *,
    file: Path | None = None,
    console: bool = True,
    stream: Stream = "stderr",
    json_lines: bool | None = None,
    level: str = "INFO",
    secrets: Iterable[str] = (),
    **bound: str,
) -> None:
    """Set up logging for this process, for structlog and for libraries that use the standard module.

    `json_lines` None means: readable on a terminal, JSON elsewhere. `file` gets JSON lines appended, whatever the
    console shows. A process with neither is silent. The console is `stream`: stderr where stdout belongs to a command's
    answer, `service_stream()` for a process whose log is all it has to say. `bound` fields are in every line.
    """
    redact = Redaction(secrets)
    if json_lines is None:
        json_lines = not getattr(sys, stream).isatty()
    handlers: list[logging.Handler] = []
    if console:
        handlers.append(_handler(_CurrentStream(stream), _as_json(redact) if json_lines else _as_text(redact)))
    if file is not None:
        handlers.append(_handler(_LogFile(file), _as_json(redact)))
    logging.basicConfig(handlers=handlers, level=level, force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(**bound)
    sys.excepthook = _log_crash


def _as_json(redact: Redaction) -> list[Processor]:
    return [
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
        redact,
        structlog.processors.JSONRenderer(ensure_ascii=False, allow_nan=False),
    ]


def _as_text(redact: Redaction) -> list[Processor]:
    return [
        redact,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback, pad_event_to=24),
        lambda _logger, _method, line: redact.text(str(line)),
    ]


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own report of an uncaught error is no JSON, and does not know what to blank."""
    if issubclass(kind, KeyboardInterrupt) or not logging.getLogger().handlers:
        sys.__excepthook__(kind, error, trace)
    else:
        structlog.get_logger().critical("crashed", exc_info=(kind, error, trace))


def _handler(handler: logging.Handler, rendering: list[Processor]) -> logging.Handler:
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
            foreign_pre_chain=_SHARED,
        )
    )
    return handler
