"""What the evaluation process answers: a request becomes an outcome, whatever the evaluation does."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_worker.evaluation.session import Session
from gpu_worker.models.errors import NotFiniteError, is_device_lost, is_out_of_memory
from gpu_worker.models.placement import ADVICE
from gpu_worker.pruning.ordered_model import PlanMismatchError
from protocol.errors import DataError, UsageError
from protocol.plans.candidate import Failed, Outcome, Race
from protocol.plans.plan import Plan


class DeviceLostError(RuntimeError):
    """CUDA failed in a way that no later call in this process survives."""


@contextmanager
def out_of_memory_as_usage_error(model: str) -> Iterator[None]:
    """While it lasts, running out of memory is a UsageError.

    Trying again would end the same way, so it is the user's to mend.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"the model {model!r} does not fit into memory ({first_line(error)}); {ADVICE}") from error


def answer(session: Session, request: dict[str, Any]) -> Outcome:
    """The outcome of a request `{"plan": …, "text": …, "race": …}`.

    Raises DeviceLostError when the process has to end.
    """
    try:
        race = None if request.get("race") is None else Race.model_validate(request["race"])
        return session.race(Plan.model_validate(request["plan"]), race, request["text"])
    except NotFiniteError as error:
        return Failed(reason="not-finite", detail=str(error))
    # ValueError is what pydantic raises for a plan that is none.
    except (PlanMismatchError, DataError, ValueError) as error:
        return Failed(reason="invalid", detail=str(error))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            _free_memory(error)
            return Failed(reason="out-of-memory", detail=f"{first_line(error)}; {ADVICE}")
        if is_device_lost(error):
            raise DeviceLostError(first_line(error)) from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's text; CUDA's go on with advice to its developers."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _free_memory(error: BaseException) -> None:
    """Give back what the failed evaluation held: its frames live as long as the error, and their tensors with them."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
