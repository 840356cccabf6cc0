"""What earlier searches found, as a text file that the LLM is told of, and that a person can read and edit."""

from pathlib import Path

import structlog

from daemon.monitor.summary import Row, Summary
from daemon.settings.settings import Settings
from protocol.errors import SettingsError
from protocol.plans.shape import ModelShape
from protocol.plans.spec import FIGURE_DIGITS, MEASURE_NAMES
from protocol.runtime.files import open_log
from protocol.runtime.paths import expanded

TOLD = "lessons.md"
"""The file in a search's folder that keeps what the LLM was told."""
LONGEST = 3000
"""Maximum number of characters of lessons that a prompt tells: the last ones of the file."""
NAMED = 3
"""Number of units that a lesson names as pruned least, and as pruned most."""

log = structlog.get_logger()


def read_lessons(settings: Settings) -> str:
    """Return what the LLM is told: the end of the file llm.lessons; "" if it is missing or not set.

    A search that was told something before is told the same again, and a replay what the replayed search was told.
    Otherwise its questions would differ. Raises SettingsError.
    """
    path = settings.llm.lessons
    if path is None:
        return ""
    told_before = settings.folder / TOLD
    if not told_before.is_file() and settings.llm.replay:
        told_before = expanded(settings.llm.replay).parent / TOLD
    if told_before.is_file():
        path = told_before
    source = expanded(path)
    try:
        if source.exists() and not source.is_file():  # a pipe may have no end
            raise SettingsError(f"llm.lessons {str(path)!r} is not a file")
        with source.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4 * LONGEST))
            text = file.read(4 * LONGEST).decode(errors="replace")
    except FileNotFoundError:
        if not source.parent.is_dir():
            raise SettingsError(f"llm.lessons {str(path)!r} cannot be written: its folder is missing") from None
        return ""
    except OSError as error:
        raise SettingsError(f"llm.lessons {str(path)!r} cannot be read: {error.strerror}") from error
    lines = "".join(letter for letter in text if letter.isprintable() or letter == "\n").splitlines()
    kept: list[str] = []
    for line in reversed(lines):
        if sum(map(len, kept)) + len(kept) + len(line) > LONGEST:
            break
        kept.append(line)
    return "\n".join(reversed(kept)).strip()


def add_lesson(path: Path, summary: Summary, shape: ModelShape) -> None:
    """Append what a search found to the file, once. A file that cannot be written is logged."""
    if not summary.best:
        return
    line = f"- {lesson(summary, shape)}\n".encode()
    try:
        target = expanded(path).resolve()  # a link is followed, as it is for reading
        with open_log(target) as file:
            known = target.read_bytes()
            if line not in known:
                file.write(b"\n" * (bool(known) and not known.endswith(b"\n")) + line)
    except (OSError, SettingsError) as error:
        log.warning("lesson_not_written", file=str(path), reason=str(error))


def lesson(summary: Summary, shape: ModelShape) -> str:
    """Return one line: the model, the rate, the best figure beside uniform, its rates, and the best rule."""
    assert summary.best is not None, "only searches with a best candidate teach something"
    digits = FIGURE_DIGITS[summary.fitness]

    def figure(row: Row) -> str:
        value = row.kl if summary.fitness == "kl" else row.perplexity
        return "unknown" if value is None else f"{value:.{digits}f}"

    units = shape.units(summary.granularity)
    ranked = sorted(zip(summary.rates, units, strict=True), key=lambda pair: pair[0])
    named = [f"{unit.name} {100 * rate:.0f} %" for rate, unit in ranked]
    rule = f"; the best rule has {figure(summary.best_rule)}: {summary.rule}" if summary.best_rule else ""
    return (
        f"{summary.model} without {100 * summary.rate:g} % of its decoder: {MEASURE_NAMES[summary.fitness]} "
        f"{figure(summary.best)}, uniform {figure(summary.uniform)}; pruned least: {', '.join(named[:NAMED])}; "
        f"pruned most: {', '.join(named[: -NAMED - 1 : -1])}{rule}"
    )
