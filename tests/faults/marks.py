"""Marks that put a test into the table of faults: `@fault(rows, fault, how, holds)`."""

from collections.abc import Callable
from typing import TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., object])
fault = pytest.mark.fault


def slow_fault(rows: str, fault: str, how: str, holds: str) -> Callable[[Test], Test]:
    """Mark a test that only `make test-faults` runs."""
    return lambda test: pytest.mark.faults(pytest.mark.fault(rows, fault, how, holds)(test))
