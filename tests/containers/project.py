"""The lines of the section "Docker Compose" of docs/guides/many-machines.md, run in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.compose import free_port
from tests.support.root import ROOT

COPIED = (
    "docker-compose.yml", "Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "configs", "deploy",
    "protocol", "agents", "daemon", "gpu_worker", "selfpruner", "prompts",
)  # fmt: skip
BASE_IMAGES = re.findall(r"^FROM (\S+:\S+) AS", (ROOT / "Dockerfile").read_text(), re.MULTILINE) + re.findall(
    r"image: (redis:\S+)", (ROOT / "docker-compose.yml").read_text()
)


def documented_lines() -> list[str]:
    """The lines of all code blocks of the section, without comments."""
    usage = (ROOT / "docs" / "guides" / "many-machines.md").read_text()
    (section,) = re.findall(r"^## Docker Compose$(.*?)(?:^## |\Z)", usage, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+# .*$", "", line) for block in blocks for line in block.splitlines()]


def check_engine() -> None:
    """Skip, with the reason, if `docker compose` cannot run here or a base image is not available."""
    if shutil.which("docker") is None:
        pytest.skip("no docker on this machine")
    answers = ["docker", "version", "--format", "{{.Server.Version}}"]
    for command in (answers, ["docker", "compose", "version"], ["docker", "buildx", "version"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"`{' '.join(command)}` fails: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    for image in BASE_IMAGES:
        if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0:
            continue
        done = subprocess.run(["docker", "pull", "--quiet", image], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"the base image {image} cannot be had: {done.stderr.strip().splitlines()[-1]}")


@dataclass
class Step:
    """A line of the table."""

    name: str
    how: str
    holds: str
    held: bool = False
    seconds: float = 0.0


steps_taken: list[Step] = []


@contextmanager
def step(name: str, how: str, holds: str) -> Iterator[None]:
    """Record the block's result in the table."""
    steps_taken.append(Step(name, how, holds))
    begin = time.monotonic()
    try:
        yield
        steps_taken[-1].held = True
    finally:
        steps_taken[-1].seconds = time.monotonic() - begin


class Project:
    """A user's folder, its `docker compose`, and the documented lines that were run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.used: set[str] = set()
        self._environment = os.environ | {
            "COMPOSE_FILE": f"docker-compose.yml{os.pathsep}{Path(__file__).with_name('compose.yaml')}",
            "COMPOSE_PROJECT_NAME": "selfpruner-test",
            "COMPOSE_PROGRESS": "plain",
            "COMPOSE_ANSI": "never",
            "HTTP_PORT": str(self.port),
        }
        for name in ("COMPOSE_PROFILES", "SEARCH_CONFIG", "LLM_BASE_URL"):
            self._environment.pop(name, None)

    def __enter__(self) -> Self:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.folder / name)
        self._remove_containers()  # of an earlier run that was killed
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_containers()

    def _remove_containers(self) -> None:
        self.run("docker compose --profile '*' down --volumes --remove-orphans --timeout 5", check=False)

    def run(self, line: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a line in a shell."""
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=self.folder,
            env=self._environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, (
            f"{line}\nexit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done

    def documented(self, *words: str, instead: tuple[str, str] = ("", "")) -> str:
        """Run the documentation's shortest line that has all `words`, with a part replaced; returns its stdout."""
        line = min((line for line in documented_lines() if all(word in line for word in words)), key=len)
        old, new = instead
        assert old in line
        self.used.add(line)
        return self.run(line.replace(old, new) if old else line).stdout

    def status(self) -> dict[str, Any]:
        """Return the output of the documentation's `status` as JSON."""
        found: dict[str, Any] = json.loads(
            self.documented("selfpruner status", instead=("--search", "--json --search"))
        )
        return found

    def inspect(self, service: str) -> list[dict[str, Any]]:
        """`docker inspect` of each container of a service."""
        ids = self.run(f"docker compose ps --all --quiet {service}").stdout.split()
        found: list[dict[str, Any]] = json.loads(self.run(f"docker inspect {' '.join(ids)}").stdout) if ids else []
        return found

    def logs(self, service: str) -> str:
        """Return all output of a service's containers."""
        written = self.run(f"docker compose logs --no-color --no-log-prefix {service}").stdout
        return re.sub(r"\x1b\[\d*[A-Z]", "", written)  # Compose clears each line, on no terminal too

    def kill(self, service: str) -> None:
        """Send SIGKILL to every process in a container. Docker restarts it, for it did not stop it itself."""
        before = self.inspect(service)[0]["RestartCount"]
        self.run(f"docker compose exec -T {service} sh -c 'kill -KILL -1'", check=False)
        self.until(lambda: self.inspect(service)[0]["RestartCount"] > before, 60)

    def until(self, holds: Callable[[], Any], seconds: float) -> None:
        """Wait until `holds` returns true. Fails after `seconds`, with the services' last output."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if holds():
                return
            time.sleep(1)
        said = self.run("docker compose ps --all; docker compose logs --no-color --tail 8", check=False).stdout
        raise AssertionError(f"not within {seconds:g} s\n{said}")
