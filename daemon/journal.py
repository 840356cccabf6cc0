"""The folder of a search: spec, card, best, every evaluation, the LLM's transcript and the log, for people and tools.

Redis is the truth; the folder is a copy that outlives it, from which a start brings back what the server has lost
(daemon/recovery.py). `evaluations.jsonl` is written anew from the history at every start, so a kill between two steps
leaves neither a gap nor a double.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import structlog

from agents.population import Evaluation, Population
from daemon.transcript import TranscriptFile
from daemon.trouble import Trouble
from protocol.candidate import Candidate, Measured, Stopped
from protocol.card import ModelCard
from protocol.errors import UsageError
from protocol.files import Lines, replace
from protocol.shape import ModelShape
from protocol.spec import SearchSpec

TRANSCRIPT = "transcript.jsonl"
EVALUATIONS = "evaluations.jsonl"
SPEC = "spec.json"
CARD = "card.json"
BEST = "best.json"
RETRY_SECONDS = 2.0

log = structlog.get_logger()


class Journal:
    """Writes the files of one search in `folder`. A disk that is full is told of, and what it lacks is written later.

    What waits for the disk is done in a thread, in order; but the transcript is written before an answer is used, so
    that a daemon that goes on asks nothing twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trouble = Trouble(folder)
        self._disk = ThreadPoolExecutor(1, "journal")
        self._copy: _Copy | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._transcript = TranscriptFile(self.transcript_path, self.trouble)
        except OSError as error:
            raise UsageError(f"run.folder cannot be written: {error}") from error

    def begin(self, search: str, spec: SearchSpec, card: ModelCard, evaluations: Population) -> None:
        """Write the spec, the model card, all evaluations so far, and their best."""
        self._copy = _Copy(self.folder, self.trouble, search, spec, card)
        self._copy.evaluations += evaluations
        self._copy.best = evaluations.best()
        self._write_copy()

    def evaluation(self, evaluation: Evaluation, *, is_best: bool) -> None:
        """Append one evaluation, and replace best.json by the best."""
        assert self._copy is not None, "begin() comes first"
        self._copy.evaluations.append(evaluation)
        if is_best:
            self._copy.best = evaluation
        self._write_copy()

    def transcript(self, record: Mapping[str, object]) -> None:
        """Append one question to the LLM with its answer."""
        self._transcript.add(_line(record))

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the file `name` by `record`."""
        with self.trouble.writing(name):
            write_json(self.folder / name, record)

    async def retry_for_ever(self) -> None:
        """Try again, now and then, to write what could not be written."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if self.trouble.files:
                self._transcript.write()
                self._write_copy()

    @property
    def transcript_path(self) -> Path:
        """The file of every question to the LLM with its answer."""
        return self.folder / TRANSCRIPT

    def begin_transcript(self) -> None:
        """Put an earlier search's transcript aside, as `transcript.1.jsonl` and so on."""
        if not self.transcript_path.stat().st_size:
            return
        self._transcript.close()
        number = 1
        while (aside := self.folder / f"transcript.{number}.jsonl").exists():
            number += 1
        try:
            self.transcript_path.rename(aside)
            self._transcript = TranscriptFile(self.transcript_path, self.trouble)
        except OSError as error:
            raise UsageError(f"run.folder cannot be written: {error}") from error

    def close(self) -> None:
        """Write what is left, or say what could not be written, and close the files."""
        self._write_copy()
        self._disk.shutdown()
        self._transcript.close()
        if self._copy:
            self._copy.close()
        if files := self.trouble.files:
            log.error("folder_incomplete", folder=str(self.folder), files=files)

    def _write_copy(self) -> None:
        if self._copy:
            self._disk.submit(copy_context().run, _told, self._copy.write)


def _told(write: Callable[[], None]) -> None:
    """Do `write`, in a thread from which no error of ours would be heard."""
    try:
        write()
    except Exception:
        log.exception("journal_failed")


class _Copy:
    """The evaluations, their best, spec and card, as far as they are written; `write` brings the files up to them."""

    def __init__(self, folder: Path, trouble: Trouble, search: str, spec: SearchSpec, card: ModelCard) -> None:
        self.evaluations: list[Evaluation] = []
        self.best: Evaluation | None = None
        self._folder, self._trouble = folder, trouble
        self._search, self._spec, self._shape = search, spec, card.shape
        self._unwritten: dict[str, dict[str, Any]] = {
            SPEC: {"search": search, "fingerprint": spec.fingerprint, **spec.model_dump()},
            CARD: card.model_dump(mode="json"),
        }
        self._lines: Lines | None = None
        self._written = 0
        self._written_best: Evaluation | None = None

    def write(self) -> None:
        """Write what is new. In a thread; the evaluations grow meanwhile."""
        for name, record in list(self._unwritten.items()):
            with self._trouble.writing(name):
                write_json(self._folder / name, record)
                del self._unwritten[name]
        with self._trouble.writing(EVALUATIONS):
            self._write_evaluations()
        best = self.best
        if best is not None and best is not self._written_best:
            with self._trouble.writing(BEST):
                write_json(self._folder / BEST, best_record(self._search, self._spec, self._shape, best))
                self._written_best = best

    def close(self) -> None:
        """Close the file of the evaluations."""
        if self._lines:
            self._lines.close()

    def _write_evaluations(self) -> None:
        if self._lines is None:
            known = list(self.evaluations)
            replace(self._folder / EVALUATIONS, "".join(_line(evaluation_record(e)) for e in known))
            self._lines, self._written = Lines(self._folder / EVALUATIONS), len(known)
        for evaluation in self.evaluations[self._written :]:
            self._lines.append(_line(evaluation_record(evaluation)))
            self._written += 1


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as one flat JSON object; of what was stopped, its race too, which its fitness is guessed from."""
    candidate, outcome = evaluation.candidate, evaluation.outcome
    race = candidate.race if isinstance(outcome, Stopped) else None
    return {
        "order": evaluation.order,
        **candidate_record(candidate),
        "outcome": outcome.model_dump(mode="json"),
        **({} if race is None else {"race": race.model_dump(mode="json")}),
    }


def candidate_record(candidate: Candidate) -> dict[str, Any]:
    """A candidate, be it measured or not, as one flat JSON object."""
    return {
        "id": candidate.id,
        "text": candidate.text,
        **candidate.provenance.model_dump(mode="json"),
        "rates": candidate.rates,
        "plan": [[p.kv_heads, p.queries_per_kv, p.mlp_channels] for p in candidate.plan.layers],
        **({} if candidate.on_windows is None else {"on_windows": candidate.on_windows}),
    }


def best_record(search: str, spec: SearchSpec, shape: ModelShape, best: Evaluation) -> dict[str, Any]:
    """What best.json holds: all that is needed to prune the model again."""
    assert isinstance(best.outcome, Measured)
    return {
        "search": search,
        "perplexity": best.outcome.perplexity,
        "kl": best.outcome.kl,
        "parameters": best.outcome.parameters.model_dump(),
        "tokens": best.outcome.tokens,
        "seqlen": spec.fitness.seqlen,
        "id": best.candidate.id,
        "provenance": best.candidate.provenance.model_dump(mode="json"),
        "rates": best.candidate.rates,
        "plan": best.candidate.plan.model_dump()["layers"],
        "shape": shape.model_dump(),
        "spec": spec.model_dump(),
    }


def write_json(path: Path, record: Mapping[str, Any], *, durable: bool = True) -> None:
    """Replace `path` by `record`, whole or not at all; `durable`: see protocol.files.replace."""
    replace(path, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", durable=durable)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False, default=str) + "\n"
