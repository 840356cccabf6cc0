"""What a search has found so far, read from its folder: what reports, drawings and programs show."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from agents.population.population import Evaluation, Population
from daemon.monitor.status import Status
from daemon.monitor.summary import Summary, summarise
from daemon.search.figures import uniform_outcome
from daemon.search.state import SearchState
from daemon.state.history import History
from daemon.state.journal import LOG, PROFILE, STATUS_FILE, saved, saved_spec
from daemon.state.recovery import recovered
from protocol.errors import UsageError
from protocol.plans.candidate import Measured
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec


@dataclass(frozen=True)
class SearchRecord:
    """A search, finished or not."""

    search: str
    spec: SearchSpec
    profile: ModelProfile
    status: Status | None
    """The last status that the search wrote."""
    history: History = field(default_factory=History)

    @classmethod
    def read(cls, folder: Path) -> "SearchRecord":
        """Read the search in `folder`. Raises UsageError if there is none, or none whose model has been measured."""
        spec = saved_spec(folder) if folder.is_dir() else None
        if spec is None:
            if (folder / LOG).exists():
                raise UsageError(f"the search in the folder {str(folder)!r} has measured nothing yet")
            raise UsageError(f"there is no search in the folder {str(folder)!r}")
        try:
            profile = ModelProfile.model_validate(saved(folder, PROFILE) or {})
            status = saved(folder, STATUS_FILE)
            return cls(
                search=folder.name,
                spec=spec,
                profile=profile,
                status=None if status is None else Status.model_validate(status),
                history=recovered(folder, spec, History()) or History(),
            )
        except ValidationError as error:
            raise UsageError(
                f"{folder / PROFILE} or {folder / STATUS_FILE} is missing, damaged, or of another version"
            ) from error

    @property
    def population(self) -> Population:
        """Return all outcomes."""
        return self.history.population

    @cached_property
    def proposals(self) -> list[Evaluation]:
        """The candidates of the search itself, without baselines and report, in the order of outcomes."""
        return [each for each in self.population if each.candidate.is_proposal]

    @property
    def uniform(self) -> Measured | None:
        """Return the outcome of uniform pruning on the fitness text; None if it was not measured yet."""
        return uniform_outcome(self.spec, self.profile, self.population)

    @property
    def finished(self) -> bool:
        """Return whether the search has ended by itself."""
        return self.status is not None and self.status.finished

    @cached_property
    def summary(self) -> Summary:
        """The figures of the dense model, of uniform pruning, and of the best candidates."""
        state = SearchState.of(self.spec, self.profile, self.history)
        return summarise(self.search, state, self.history.counters, finished=self.finished)
