"""Fixtures of the worker's tests. Folders are made once for all of them, and not changed."""

from pathlib import Path

import pytest

from protocol.plans.spec import SearchSpec
from tests.support.tiny_specs import tiny_spec


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SearchSpec:
    return tiny_spec(tmp_path_factory.mktemp("spec"))


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached, and nothing of it is on this machine."""
    monkeypatch.setattr("gpu_worker.measuring.corpora.hub_reachable", lambda: False)
    # Set here to be restored: the process goes offline for good.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
