"""Logging with structlog: readable lines on a terminal, JSON lines elsewhere, secrets hidden in both."""

import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

from protocol.runtime.files import AppendOnlyFile

HIDDEN = "***"
CHATTY = ("httpx", "httpx2", "httpcore", "openai", "asyncio", "urllib3", "filelock", "aiohttp.access")
"""Libraries of which only warnings and errors are logged."""
_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]
"""Processors for our own lines and for the lines of libraries."""
_SECRET_NAME = re.compile(r"(api_?key|authorization|token$|password|secret)", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^\s/:@]*):[^\s/]+@")
_URL_QUERY = re.compile(r"([?&](?:api[-_]?key|key|(?:access_)?token|password|secret|sig(?:nature)?)=)[^\s&\"']+", re.I)


_DEEPEST = 20
"""Maximum number of levels of nesting in a log line. The limit also ends self-references."""


class Redaction:
    """A processor that makes an event valid JSON and hides its secrets.

    Secrets are recognised by field name, by configured value, and as passwords and keys in URLs. Objects and numbers
    that JSON cannot represent (NaN) are converted to text first, so that they neither break a line nor reveal a secret.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({s for s in secrets if len(s) >= 4}, key=len, reverse=True)

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        """Return the event without its secrets."""
        # The console renders a traceback from the exception itself. Its secrets are hidden in the rendered line.
        return {key: value if key == "exc_info" else self._field(key, value, _DEEPEST) for key, value in event.items()}

    def text(self, text: str) -> str:
        """Return `text` without its secrets, encodable as UTF-8."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        text = _URL_QUERY.sub(rf"\1{HIDDEN}", text)
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
    """A log file shared by the processes of a search. The console reports a full disk, and later the lost lines.

    If the file was deleted, the next line restores it, with its earlier lines unless it was large. If the file was
    moved, as logrotate does, a new file is started.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._lines = AppendOnlyFile(path, shared=True)
        self._missing = 0
        self._was_removed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record. If that fails, count the line as lost."""
        try:
            if self._lines.is_moved:
                self._lines.reopen()
            elif self._lines.is_gone:
                self._was_removed |= self._lines.restore()
            self._lines.append(self.format(record) + "\n")
        except OSError as error:
            self._missing += 1
            if self._missing == 1:  # the line logged here also reaches this handler, as the second missing line
                structlog.get_logger().error("log_not_written", file=str(self._path), error=str(error))
        except Exception:  # noqa: BLE001  (like every handler of the standard library)
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
    """Writes to the current sys.stderr (or stdout), so that a live display may redirect it."""

    def __init__(self, name: Stream) -> None:
        logging.Handler.__init__(self)
        self._name = name

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        stream: TextIO = getattr(sys, self._name)
        return stream


def service_stream() -> Stream:
    """Return where a service (daemon, worker) logs: stderr on a terminal, else stdout."""
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
    """Configure logging of this process, for structlog and for libraries that use the standard `logging` module.

    `json_lines` None means readable lines on a terminal, JSON elsewhere. JSON lines are appended to `file`, if given. A
    process with neither file nor console logs nothing. The console is `stream`: stderr for a command, whose result goes
    to stdout, and `service_stream()` for a service. `bound` fields are added to every line.
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


@contextmanager
def left_as_before() -> Iterator[None]:
    """Restore this process's logging at the end of the block, for programs that call Self-Pruner as a library."""
    root, hook, settings = logging.getLogger(), sys.excepthook, structlog.get_config()
    handlers, level, bound = list(root.handlers), root.level, dict(structlog.contextvars.get_contextvars())
    chatty = {name: logging.getLogger(name).level for name in CHATTY}
    root.handlers[:] = []  # so that `configure` does not close them
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in chatty.items():
            logging.getLogger(name).setLevel(before)
        structlog.configure(**settings)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**bound)
        sys.excepthook = hook


@contextmanager
def silent() -> Iterator[None]:
    """Write no log within the block, and restore this process's logging at its end."""
    with left_as_before():
        configure(console=False)
        yield


def _as_json(redact: Redaction) -> list[Processor]:
    return [
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
        redact,
        structlog.processors.JSONRenderer(ensure_ascii=False, allow_nan=False),
    ]


def _as_text(redact: Redaction) -> list[Processor]:
    return [
        redact,
        _for_a_person,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback, pad_event_to=24),
        lambda _logger, _method, line: redact.text(str(line)),
    ]


def _for_a_person(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Return the event with whole seconds. If it has the field `says`, return this sentence in place of the fields."""
    kept = {"event": event["says"], "level": event["level"]} if "says" in event else event
    return {**kept, "timestamp": re.sub(r"\.\d+Z$", "Z", event["timestamp"])}


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log an uncaught error, because Python's own report is not JSON and would show secrets."""
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
