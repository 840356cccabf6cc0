"""The folder of a search: spec, best, every evaluation, the LLM's transcript and the log, for people and other tools.

Redis is the truth; the folder is a copy that outlives it, from which a start brings back what the server has lost
(daemon/recovery.py). `evaluations.jsonl` is written anew from the history at every start, so a kill between two steps
leaves neither a gap nor a double.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from agents.population import Evaluation, Population
from protocol.candidate import Candidate, Measured
from protocol.errors import UsageError
from protocol.shape import ModelShape
from protocol.spec import SearchSpec

TRANSCRIPT = "transcript.jsonl"
EVALUATIONS = "evaluations.jsonl"
SPEC = "spec.json"


class Journal:
    """Writes the files of one search in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._evaluations: TextIO | None = None
            self._transcript = _open_to_append(self.transcript_path)
        except OSError as error:
            raise UsageError(f"run.folder cannot be written: {error}") from error

    def begin(self, search: str, spec: SearchSpec, shape: ModelShape, evaluations: Population) -> None:
        """Write the spec, all evaluations so far, and their best."""
        write_json(self.folder / SPEC, {"search": search, "fingerprint": spec.fingerprint, **spec.model_dump()})
        lines = "".join(_line(evaluation_record(e)) for e in evaluations)
        _replace(self.folder / EVALUATIONS, lines)
        self._evaluations = (self.folder / EVALUATIONS).open("a", encoding="utf-8")
        if best := evaluations.best():
            self.best(best_record(search, spec, shape, best))

    def evaluation(self, evaluation: Evaluation) -> None:
        """Append one evaluation."""
        assert self._evaluations is not None, "begin() comes first"
        self._evaluations.write(_line(evaluation_record(evaluation)))
        self._evaluations.flush()

    def best(self, record: Mapping[str, Any]) -> None:
        """Replace best.json."""
        write_json(self.folder / "best.json", record)

    def transcript(self, record: Mapping[str, object]) -> None:
        """Append one question to the LLM with its answer."""
        self._transcript.write(_line(record))
        self._transcript.flush()

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
        self.transcript_path.rename(aside)
        self._transcript = _open_to_append(self.transcript_path)

    def close(self) -> None:
        """Close the files."""
        self._transcript.close()
        if self._evaluations:
            self._evaluations.close()


def _open_to_append(path: Path) -> TextIO:
    """The file at `path`, which then ends with a whole line: a kill may have torn its last one."""
    file = path.open("a", encoding="utf-8")
    if path.stat().st_size:
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                file.write("\n")
    return file


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as one flat JSON object."""
    return {
        "order": evaluation.order,
        **candidate_record(evaluation.candidate),
        "outcome": evaluation.outcome.model_dump(mode="json"),
    }


def candidate_record(candidate: Candidate) -> dict[str, Any]:
    """A candidate, be it measured or not, as one flat JSON object."""
    return {
        "id": candidate.id,
        "text": candidate.text,
        **candidate.provenance.model_dump(mode="json"),
        "rates": candidate.rates,
        "plan": [[p.kv_heads, p.queries_per_kv, p.mlp_channels] for p in candidate.plan.layers],
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


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Replace `path` by `record`, whole or not at all."""
    _replace(path, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False, default=str) + "\n"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
