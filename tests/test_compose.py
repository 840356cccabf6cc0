"""docker-compose.yml is valid, and each service's settings are ones that the program takes."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon.settings import load

ROOT = Path(__file__).parent.parent


def test_every_profile_of_the_compose_file_is_valid() -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("no docker-compose on this machine (Debian: docker-compose)")
    for profile in ([], ["--profile", "local-llm"]):
        subprocess.run(["docker-compose", *profile, "config", "--quiet"], check=True, cwd=ROOT)


def test_the_daemons_environment_names_settings_and_its_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, value in services["daemon"]["environment"].items():
        filled = value.replace("${LLM_BASE_URL:-http://llm:8000/v1}", "http://llm:8000/v1")
        monkeypatch.setenv(name, filled.replace("${LLM_MODEL:-local}", "local"))
    settings = load(ROOT / "configs" / "local-llm.yaml")
    assert settings.redis.url == "redis://redis:6379"
    assert [e.base_url for e in settings.llm.endpoints] == ["http://llm:8000/v1"]
    assert json.loads(os.environ["SELFPRUNER_LLM__ENDPOINTS"])[0]["model"] == "local"


def test_redis_keeps_its_data_and_is_not_published() -> None:
    redis = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["redis"]
    assert "ports" not in redis
    assert {"--appendonly", "noeviction"} <= set(redis["command"])
    assert redis["volumes"]
