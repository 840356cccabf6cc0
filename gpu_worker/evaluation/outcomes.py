"""Turns requests to the evaluation process into outcomes, even if the evaluation fails."""

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
    """CUDA failed in a way that makes all later calls in this process fail too."""


@contextmanager
def out_of_memory_as_usage_error(model: str) -> Iterator[None]:
    """Convert out-of-memory errors into UsageError.

    A retry would fail the same way; the user must change the settings.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"the model {model!r} does not fit into memory ({first_line(error)}); {ADVICE}") from error


def answer(session: Session, request: dict[str, Any]) -> Outcome:
    """Return the outcome of a request `{"plan": …, "text": …, "race": …}`.

    When memory runs out, the plan is measured once more from a dense model, which has no copied weights. Raises
    DeviceLostError when the process must end.
    """
    try:
        race = None if request.get("race") is None else Race.model_validate(request["race"])
        plan = Plan.model_validate(request["plan"])
        try:
            return session.race(plan, race, request["text"])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        session.target.ordered.restore()
        _free_cached()
        return session.race(plan, race, request["text"])
    except NotFiniteError as error:
        return Failed(reason="not-finite", detail=str(error))
    # pydantic raises ValueError for an invalid plan.
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
    """Return the first line of an error's message. CUDA's messages continue with advice for developers."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _free_memory(error: BaseException) -> None:
    """Free the memory of the failed evaluation.

    The error keeps the frames of its traceback alive, and the frames keep their tensors.
    """
    traceback.clear_frames(error.__traceback__)
    _free_cached()


def _free_cached() -> None:
    """Return to the GPU what torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
