"""The folder of a search: spec, profile, best, rules, every evaluation, the LLM's transcript and the log.

Redis has the authoritative state. The folder is a copy that survives the server. If the server has lost data, the next
start restores it from the folder (daemon/state/recovery.py). `evaluations.jsonl` is rewritten from the history at every
start, so a kill leaves neither gaps nor duplicates. Files that another process removes or changes are rewritten within
RETRY_SECONDS.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from agents.population.population import Evaluation, Population
from daemon.state.folder_errors import FolderErrors
from daemon.state.transcript import TranscriptFile
from protocol.errors import UsageError
from protocol.plans.candidate import Candidate, Measured, Stopped
from protocol.plans.profile import ModelProfile
from protocol.plans.shape import ModelShape
from protocol.plans.spec import SearchSpec
from protocol.runtime.files import AppendOnlyFile, AtomicFile, write_atomically

TRANSCRIPT = "transcript.jsonl"
EVALUATIONS = "evaluations.jsonl"
SPEC = "spec.json"
PROFILE = "profile.json"
BEST = "best.json"
RULES = "rules.json"
STATUS_FILE = "status.json"
LOG = "log.jsonl"
RETRY_SECONDS = 2.0
KEPT_RULES = 20
"""Maximum number of rules in rules.json, best first."""

log = structlog.get_logger()


class Journal:
    """Writes the files of one search in `folder`. If the disk is full, it logs that and writes later.

    The copy of the search is written in a thread, in order. Each answer of the LLM is written to the transcript before
    it is used, so that a restarted daemon asks no question twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder_errors = FolderErrors(folder)
        self._disk = ThreadPoolExecutor(1, "journal")
        self._written: Future[None] | None = None
        self._kept: dict[str, AtomicFile] = {}
        self._copy: _Copy | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._transcript = TranscriptFile(self.transcript_path, self.folder_errors)
        except OSError as error:
            raise UsageError(f"run.folder cannot be written: {error}") from error

    def begin(self, search: str, spec: SearchSpec, profile: ModelProfile, evaluations: Population) -> None:
        """Write the spec, the model profile, all evaluations so far, and their best."""
        self._copy = _Copy(self.folder, self.folder_errors, search, spec, profile)
        self._copy.evaluations += evaluations
        self._copy.best = evaluations.best()
        self._write_copy()

    def evaluation(self, evaluation: Evaluation, *, is_best: bool) -> None:
        """Append one evaluation. If it is the best so far, also replace best.json."""
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
        self.write_text(name, json_text(record))

    def write_text(self, name: str, text: str) -> None:
        """Replace the file `name` by `text`."""
        with self.folder_errors.writing(name):
            write_atomically(self.folder / name, text)

    def keep(self, name: str, text: str, *, mode: int) -> None:
        """Write the file `name` with the permissions `mode`, and write it again whenever it was removed or changed."""
        self._kept[name] = file = AtomicFile(self.folder / name, durable=False, mode=mode)
        self.folder_errors.watch(name, lambda: file.is_gone)
        with self.folder_errors.writing(name):
            file.write(text)

    async def keep_forever(self) -> None:
        """Retry failed writes, and rewrite files that were removed or changed, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            self._transcript.write()
            if self._written is None or self._written.done():  # otherwise the disk has not finished the last write
                self._write_copy()
                self._disk.submit(copy_context().run, _logging_errors, self._write_kept)

    @property
    def transcript_path(self) -> Path:
        """The file of every question to the LLM with its answer."""
        return self.folder / TRANSCRIPT

    def begin_transcript(self) -> None:
        """Rename the transcript of an earlier search to `transcript.1.jsonl`, or to the next free number."""
        self._transcript.write()  # this restores the file if it was removed
        if self._transcript.is_empty:
            return
        self._transcript.close()
        number = 1
        while (aside := self.folder / f"transcript.{number}.jsonl").exists():
            number += 1
        try:
            self.transcript_path.rename(aside)
            self._transcript = TranscriptFile(self.transcript_path, self.folder_errors)
        except OSError as error:
            raise UsageError(f"run.folder cannot be written: {error}") from error

    def close(self) -> None:
        """Write what is left, log what could not be written, and close the files."""
        self._write_copy()
        self._disk.shutdown()
        self._transcript.close()
        if self._copy:
            self._copy.close()
        if files := self.folder_errors.files:
            log.error("folder_incomplete", folder=str(self.folder), files=files)

    def _write_copy(self) -> None:
        if self._copy:
            self._written = self._disk.submit(copy_context().run, _logging_errors, self._copy.write)

    def _write_kept(self) -> None:
        for name, file in self._kept.items():
            if file.is_changed:
                self.folder_errors.changed([name])
                with self.folder_errors.writing(name):
                    file.write_again()


def _logging_errors(write: Callable[[], None]) -> None:
    """Call `write` in a thread, and log errors, which would otherwise be lost."""
    try:
        write()
    except Exception:
        log.exception("journal_failed")


class _Copy:
    """The evaluations, the best candidate, the spec and the model profile. `write` brings their files up to date."""

    def __init__(
        self, folder: Path, folder_errors: FolderErrors, search: str, spec: SearchSpec, profile: ModelProfile
    ) -> None:
        self.evaluations: list[Evaluation] = []
        self.best: Evaluation | None = None
        self._folder, self._folder_errors = folder, folder_errors
        self._search, self._spec, self._shape = search, spec, profile.shape
        self._unwritten: dict[str, dict[str, Any]] = {
            SPEC: {"search": search, "fingerprint": spec.fingerprint, **spec.model_dump()},
            PROFILE: profile.model_dump(mode="json"),
        }
        self._files = {name: AtomicFile(folder / name) for name in (SPEC, PROFILE, BEST, RULES)}
        self._lines: AppendOnlyFile | None = None
        self._written = 0
        self._known_best: Evaluation | None = None
        self._read_for_rules = 0
        self._rules: list[tuple[float, Evaluation]] = []
        for name, file in self._files.items():
            folder_errors.watch(name, lambda file=file: file.is_gone)  # type: ignore[misc]
        folder_errors.watch(EVALUATIONS, lambda: self._lines is not None and self._lines.is_gone)

    def write(self) -> None:
        """Write new data, and rewrite changed files. Runs in a thread while evaluations are added."""
        changed = self._changed()
        if changed:
            self._folder_errors.changed(changed)
        best = self.best
        if best is not None and best is not self._known_best:
            self._unwritten[BEST] = best_record(self._search, self._spec, self._shape, best)
            self._known_best = best
        if self._finds_rules():
            self._unwritten[RULES] = rules_record(self._search, self._spec, [e for _, e in self._rules])
        for name, file in self._files.items():
            with self._folder_errors.writing(name):
                if record := self._unwritten.get(name):
                    file.write(json_text(record))
                    del self._unwritten[name]
                elif name in changed:
                    file.write_again()
        with self._folder_errors.writing(EVALUATIONS):
            self._write_evaluations()

    def _finds_rules(self) -> bool:
        """Take the rules of new evaluations into the best rules; return whether there were any."""
        new = self.evaluations[self._read_for_rules :]
        self._read_for_rules += len(new)
        ruled = [(e.outcome.fitness, e) for e in new if e.candidate.provenance.rule and isinstance(e.outcome, Measured)]
        self._rules = sorted([*self._rules, *ruled], key=lambda pair: pair[0])[:KEPT_RULES]
        return bool(ruled)

    def close(self) -> None:
        """Close the file of the evaluations."""
        if self._lines:
            self._lines.close()

    def _changed(self) -> list[str]:
        """Return the files that were removed or changed."""
        changed = [name for name, file in self._files.items() if file.is_changed]
        if self._lines and self._lines.is_changed:
            changed.append(EVALUATIONS)
            self._lines.close()
            self._lines = None
        return changed

    def _write_evaluations(self) -> None:
        if self._lines is None:
            known = list(self.evaluations)
            write_atomically(self._folder / EVALUATIONS, "".join(_line(evaluation_record(e)) for e in known))
            self._lines, self._written = AppendOnlyFile(self._folder / EVALUATIONS), len(known)
        for evaluation in self.evaluations[self._written :]:
            self._lines.append(_line(evaluation_record(evaluation)))
            self._written += 1


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as a JSON object. A stopped one includes its race, from which its fitness is estimated."""
    candidate, outcome = evaluation.candidate, evaluation.outcome
    race = candidate.race if isinstance(outcome, Stopped) else None
    return {
        "order": evaluation.order,
        **candidate_record(candidate),
        "outcome": outcome.model_dump(mode="json"),
        **({} if race is None else {"race": race.model_dump(mode="json")}),
    }


def candidate_record(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate, measured or not, as a flat JSON object."""
    return {
        "id": candidate.id,
        "text": candidate.text,
        **candidate.provenance.model_dump(mode="json"),
        "rates": candidate.rates,
        "plan": [[p.kv_heads, p.queries_per_kv, p.mlp_channels] for p in candidate.plan.layers],
    }


def best_record(search: str, spec: SearchSpec, shape: ModelShape, best: Evaluation) -> dict[str, Any]:
    """Return the contents of best.json: everything that is needed to prune the model again."""
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


def rules_record(search: str, spec: SearchSpec, ruled: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the contents of rules.json: the rules of these evaluations, and what they were measured on."""
    rules = [
        {
            "rule": evaluation.candidate.provenance.rule,
            "perplexity": evaluation.outcome.perplexity,
            "kl": evaluation.outcome.kl,
            **evaluation.candidate.provenance.model_dump(mode="json", include={"agent", "source", "round"}),
            "id": evaluation.candidate.id,
        }
        for evaluation in ruled
        if isinstance(evaluation.outcome, Measured)
    ]
    return {"search": search, "rules": rules, "spec": spec.model_dump()}


def json_text(record: Mapping[str, Any]) -> str:
    """Return the text of an indented JSON file."""
    return json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False, default=str) + "\n"


def saved(folder: Path, file: str) -> dict[str, Any] | None:
    """Return what the search in `folder` last wrote to `file`, or None."""
    path = folder / file
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read, or is damaged: {error}") from error
    return record if isinstance(record, dict) else None


def saved_spec(folder: Path) -> SearchSpec | None:
    """Return the spec of the search in `folder`, or None. Raises UsageError if it cannot be read."""
    record = saved(folder, SPEC)
    if record is None:
        return None
    try:
        return SearchSpec.model_validate({name: record[name] for name in SearchSpec.model_fields if name in record})
    except ValidationError as error:
        raise UsageError(f"{folder / SPEC} was written by another version, or is damaged") from error
