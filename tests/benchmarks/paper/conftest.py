"""A folder of benchmarks.paper."""

from pathlib import Path

import pytest

from tests.support.paper import Paper


@pytest.fixture
def paper(tmp_path: Path) -> Paper:
    return Paper(tmp_path)
