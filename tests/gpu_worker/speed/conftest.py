"""Folders whose speed is measured, made once."""

from pathlib import Path

import pytest

from tests.support.speed_folders import save_folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folders(tmp_path_factory.mktemp("speed"))
