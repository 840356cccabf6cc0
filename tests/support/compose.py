"""docker-compose.yml without an engine: each service's own command, environment, mounts and secrets as local processes.

What an engine does is done as far as a process allows: variables are filled in, paths of mounts and secrets become
paths of this machine, names of services become loopback ports, images' environments are read from the Dockerfile.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from tests.support.root import ROOT

COMPOSE_FILE = ROOT / "docker-compose.yml"
_VARIABLE = re.compile(r"\$\$|\$\{(\w+):([-+])([^}]*)\}")


def read_services(environment: Mapping[str, str]) -> dict[str, Any]:
    """The compose file with its variables filled in, and each service's environment as a mapping."""

    def fill(match: re.Match[str]) -> str:
        if match[1] is None:
            return "$"
        value = environment.get(match[1], "")
        return (match[3] if value else "") if match[2] == "+" else value or match[3]

    filled: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(fill, COMPOSE_FILE.read_text()))
    for service in filled["services"].values():
        if isinstance(listed := service.get("environment"), list):
            service["environment"] = dict(entry.split("=", 1) for entry in listed)
    return filled


def image_environment(target: str) -> dict[str, str]:
    """The ENV of a stage of the Dockerfile and of those it is built from."""
    found: dict[str, str] = {}
    for stage in re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]:
        base, _, name = stage.partition("\n")[0].partition(" AS ")
        if name == target:
            pairs = re.findall(r"^ENV (.*)$", stage, re.MULTILINE)
            found = dict(pair.split("=", 1) for line in pairs for pair in shlex.split(line))
            return image_environment(base) | found
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Container:
    """A service's process and its output."""

    service: str
    process: subprocess.Popen[bytes]
    folder: Path
    grace_seconds: float

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def stop(self) -> int:
        """Send SIGTERM, like `docker stop`. Fails if the grace period is not enough."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(self.grace_seconds)


@dataclass
class Deployment:
    """`docker compose` in `folder`, with `environment` as its .env and `ports` for services that are not started."""

    folder: Path
    environment: Mapping[str, str]
    ports: dict[str, int]
    containers: list[Container] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = read_services(self.environment)
        for name in ("redis:6379", "daemon:8090"):
            self.ports[name] = free_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left_behind():
            process.kill()
        for container in self.containers:
            container.process.kill()
            container.process.wait()

    def up(self, service: str) -> Container:
        """Start one more container of a service."""
        definition = self._file["services"][service]
        number = sum(c.service == service for c in self.containers)
        folder = self.folder / "containers" / f"{service}-{number}"
        folder.mkdir(parents=True)
        target = definition.get("build", {}).get("target")
        command = ["python", "-m", "daemon"] if target else []  # what the entry point `selfpruner` is
        environment = image_environment(target) if target else {}
        environment |= definition["environment"]
        command += [self._local(service, part) for part in definition["command"]]
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable if command[0] == "python" else command[0], *command[1:]],
                cwd=folder,
                env=self._system() | {name: self._local(service, str(value)) for name, value in environment.items()},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        seconds = float(definition["stop_grace_period"].removesuffix("s"))
        self.containers.append(Container(service, process, folder, seconds))
        return self.containers[-1]

    def execute(self, service: str, *command: str) -> str:
        """Run a command like `docker compose exec` or `run --rm`; returns its stdout."""
        definition = self._file["services"][service]
        environment = {name: self._local(service, str(value)) for name, value in definition["environment"].items()}
        local = [self._local(service, part) for part in command]
        if local[0] == "selfpruner":
            local[:1] = [sys.executable, "-m", "daemon"]
        done = subprocess.run(local, env=self._system() | environment, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_until_healthy(self, service: str, seconds: float = 30) -> None:
        """Wait until the service's own health check passes."""
        kind, check = self._file["services"][service]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if subprocess.run(["sh", "-c", self._local(service, check)], env=self._system()).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"{service} is not healthy: {[c.stderr for c in self.containers]}")

    def stop(self) -> dict[str, list[int]]:
        """Stop dependent services first, like `docker compose stop`; returns exit codes by service."""
        running = [c for c in self.containers if c.process.poll() is None]
        codes: dict[str, list[int]] = {}
        for container in sorted(running, key=lambda c: c.service == "redis"):
            codes.setdefault(container.service, []).append(container.stop())
        return codes

    def left_behind(self) -> list[psutil.Process]:
        """Return the processes of any container that are still running."""
        processes = psutil.process_iter(["cwd"])
        return [p for p in processes if (p.info["cwd"] or "").startswith(str(self.folder))]

    def everything_written(self) -> str:
        """Return all output of containers, and every file in their volumes."""
        files = [f for where in ("containers", "volumes") for f in (self.folder / where).rglob("*") if f.is_file()]
        return "\n".join(f.read_bytes().decode("utf-8", "replace") for f in files)

    def _system(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        # The images have a `python`; of this machine's only the one that runs the tests is known to be there.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"}

    def _local(self, service: str, text: str) -> str:
        """Replace in `text` the paths and names of containers by their local counterparts."""
        paths = self._paths(service)
        names = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
        text = re.sub(rf"(?<![\w.-])({names})(?=[/\"')\s]|$)", lambda match: str(paths[match[1]]), text)
        for name, port in self.ports.items():
            host, _, inside = name.partition(":")
            text = re.sub(rf"(?<![\w.-]){host}:{inside}\b", f"127.0.0.1:{port}", text)
            if service == host:
                text = re.sub(rf"(^|-p |127\.0\.0\.1:){inside}\b", rf"\g<1>{port}", text)
        return text

    def _paths(self, service: str) -> dict[str, Path]:
        definition = self._file["services"][service]
        paths = {"/tmp": self._made("tmpfs", service)}
        for volume in definition["volumes"]:
            source, path = volume.split(":")[:2]
            is_named = source in self._file["volumes"]
            paths[path] = self._made("volumes", source) if is_named else ROOT / source
        for secret in definition["secrets"]:
            paths[f"/run/secrets/{secret}"] = ROOT / self._file["secrets"][secret]["file"]
        return paths

    def _made(self, *parts: str) -> Path:
        folder = self.folder.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
