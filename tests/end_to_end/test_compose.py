"""docker-compose.yml: valid, hardened, and run: each service's own command with its own environment, as processes."""

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from daemon.settings.sources import load
from tests.support.compose import Container, Deployment, read_services
from tests.support.root import ROOT
from tests.support.schema_answers import answer
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import eventually
from tests.support.tiny_specs import tiny_search

PASSWORD = "a/redis+password=="
API_KEY = "sk-of-the-llm-1234"
HTTP_TOKEN = "a-token/of-the+http-api=="
SECRETS = {"redis_password": PASSWORD, "llm_api_key": API_KEY, "http_token": HTTP_TOKEN, "hf_token": ""}
GUIDE = (ROOT / "docs" / "guides" / "many-machines.md").read_text()
DEAD = "http://127.0.0.1:9/v1"
CANDIDATES = 6 + 3 * (3 + 2)
PROFILES = {"gpu": "gpu-worker", "cpu": "cpu-worker", "local-llm": "llama-cpp", "local-llm-vllm": "vllm"}
"""Profile -> the service that it starts."""


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read_services({})["services"]
    return found


def check_docker_compose() -> None:
    """Skip where there is none that the file needs."""
    if shutil.which("docker-compose") is None:
        pytest.skip("no docker-compose on this machine (Debian: docker-compose)")
    version = subprocess.run(["docker-compose", "version", "--short"], check=True, capture_output=True, text=True)
    if [int(part) for part in version.stdout.lstrip("v").split(".")[:2]] < [2, 20]:
        pytest.skip(f"docker-compose {version.stdout.strip()} is older than 2.20, which knows optional dependencies")


@pytest.mark.parametrize("profiles", [(), *((name,) for name in PROFILES), tuple(PROFILES)])
def test_every_profile_of_the_compose_file_is_valid(profiles: tuple[str, ...]) -> None:
    check_docker_compose()
    flags = [part for name in profiles for part in ("--profile", name)]
    done = subprocess.run(["docker-compose", *flags, "config", "--services"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"redis", "daemon", *(PROFILES[name] for name in profiles)}


def test_every_service_is_without_capabilities_and_ends_in_order(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["init"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name  # a machine that starts again goes on
        assert service["read_only"] or name == "vllm"
        assert "stop_grace_period" in service and "max-size" in service["logging"]["options"], name
        assert not service.get("privileged")
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_images_are_pinned_to_versions(services: dict[str, Any]) -> None:
    foreign = {name: service["image"] for name, service in services.items() if "build" not in service}
    assert set(foreign) == {"redis", "llama-cpp", "vllm"}
    assert all(re.search(r":[\w.]*-?[bv]?\d[\w.-]+$", image) for image in foreign.values()), foreign


def test_secrets_are_files_and_no_environment_or_command_holds_one(services: dict[str, Any]) -> None:
    assert services["redis"]["secrets"] == ["redis_password"]
    assert services["daemon"]["secrets"] == ["redis_password", "llm_api_key", "http_token"]
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            is_secret = re.search(r"PASSWORD|KEY|TOKEN", name) is not None
            assert not is_secret or value.startswith("/run/secrets/"), name
            assert not re.search(r"//[^/@]*:[^/@]*@", str(value)), name


def endpoints_of_the_daemon(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked with the settings file and the environment that `environment` makes of the compose file."""
    daemon = read_services(environment)["services"]["daemon"]
    for name, value in daemon["environment"].items():
        monkeypatch.setenv(name, value)
    file = ROOT / daemon["command"][1].removeprefix("/app/")
    return [(endpoint.base_url, endpoint.model) for endpoint in load(file).llm.endpoints]


def test_the_endpoints_are_those_of_the_settings_file_unless_a_variable_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert endpoints_of_the_daemon({"SEARCH_CONFIG": "paper.yaml"}, monkeypatch) == [
        ("https://api.openai.com/v1", "gpt-4o")
    ]
    assert endpoints_of_the_daemon({}, monkeypatch) == [("http://llm:8000/v1", "local")]
    mine = {"LLM_BASE_URL": "http://mine/v1", "LLM_MODEL": "m", "SEARCH_CONFIG": "paper.yaml"}
    assert endpoints_of_the_daemon(mine, monkeypatch) == [("http://mine/v1", "m")]


@pytest.mark.parametrize(
    "environment", [{}, {"LLM_BASE_URL": "http://mine/v1", "SEARCH_CONFIG": "x", "HTTP_PORT": "1"}]
)
def test_docker_compose_fills_in_variables_as_these_tests_do(environment: dict[str, str]) -> None:
    check_docker_compose()
    command = ["docker-compose", "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)["services"]
    ours = read_services(environment)["services"]
    for name, service in ours.items():
        assert theirs[name].get("environment") == {
            key: str(value) for key, value in service.get("environment", {}).items()
        }
        # docker-compose prints what it would read again, and so doubles each dollar
        assert [part.replace("$$", "$") for part in theirs[name]["command"]] == service["command"]


def test_the_lines_that_make_the_secrets_leave_files_that_containers_read_and_their_owner_writes(
    tmp_path: Path,
) -> None:
    (lines,) = re.findall(r"```sh\n(install -d -m 700 secrets.*?)```", GUIDE, re.DOTALL)
    head = re.findall(r"^#   (.*)$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    assert lines.splitlines() == head
    subprocess.run(["sh", "-ec", f"umask 077\n{lines}"], cwd=tmp_path, check=True)
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets").iterdir()}
    assert modes == dict.fromkeys(SECRETS, 0o644)


def test_a_worker_has_longer_to_stop_than_it_takes(services: dict[str, Any]) -> None:
    for name in ("gpu-worker", "cpu-worker"):
        command = services[name]["command"]
        grace = float(command[command.index("--grace-seconds") + 1])
        assert float(services[name]["stop_grace_period"].removesuffix("s")) >= grace + 5


def test_the_daemon_and_the_workers_read_the_same_settings_file() -> None:
    services = read_services({"SEARCH_CONFIG": "mine.yaml", "CONFIGS": "/etc/searches"})["services"]
    for name in ("gpu-worker", "cpu-worker"):
        command = services[name]["command"]
        assert command[command.index("--config") + 1] == services["daemon"]["command"][1] == "/app/configs/mine.yaml"
        assert not {"--search", "--redis-url"} & set(command)
        assert "/etc/searches:/app/configs:ro" in services[name]["volumes"]
        assert "/etc/searches:/app/configs:ro" in services["daemon"]["volumes"]


def test_a_service_that_cannot_work_waits_and_is_not_started_for_ever(services: dict[str, Any]) -> None:
    assert all("--stay" in services[name]["command"] for name in ("daemon", "gpu-worker", "cpu-worker"))


def test_only_the_gpu_worker_and_vllm_ask_for_gpus(services: dict[str, Any]) -> None:
    assert {name for name, service in services.items() if "deploy" in service} == {"gpu-worker", "vllm"}
    (device,) = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_redis_keeps_its_data_evicts_nothing_and_is_reached_by_the_search_alone(services: dict[str, Any]) -> None:
    redis = services["redis"]
    assert "ports" not in redis
    options = dict(zip(redis["command"][2::2], redis["command"][3::2], strict=True))
    assert (options["--appendonly"], options["--maxmemory-policy"]) == ("yes", "noeviction")
    assert redis["volumes"][0] == "redis-data:" + options["--dir"]
    assert redis["networks"] == ["internal"] and read_services({})["networks"]["internal"] == {"internal": True}
    reached = {name for name, service in services.items() if "internal" in service["networks"]}
    assert reached == {"redis", "daemon", "gpu-worker", "cpu-worker"}
    for name in reached - {"redis"}:
        assert services[name]["depends_on"]["redis"] == {"condition": "service_healthy"}


@pytest.fixture
async def llm() -> AsyncIterator[ScriptedLlm]:
    """Slow enough for a stop to find the search at work."""
    async with ScriptedLlm(partial(answer, after=0.03)) as llm:
        yield llm


@pytest.fixture
def deployment(tmp_path: Path, target: Path, llm: ScriptedLlm) -> Iterator[Deployment]:
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on this machine (Debian: redis-server)")
    (tmp_path / "secrets").mkdir()
    for name, secret in SECRETS.items():
        (tmp_path / "secrets" / name).write_text(f"{secret}\n")
    key = {"model": "m", "api_key_file": str(tmp_path / "secrets" / "llm_api_key")}
    endpoints = [{"base_url": url, "name": name, **key} for name, url in (("dead", DEAD), ("llm", llm.base_url))]
    settings = tiny_search("tiny", target / "model", target / "text.txt", endpoints)
    settings["llm"]["attempts"] = 1
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(json.dumps(settings))
    environment = {"CONFIGS": str(tmp_path / "configs"), "SEARCH_CONFIG": "tiny.yaml", "DATA": str(target)}
    environment |= {f"{name.upper()}_FILE": str(tmp_path / "secrets" / name) for name in SECRETS}
    with Deployment(tmp_path, environment, {"llm:8000": llm.port}) as deployment:
        yield deployment


def up(deployment: Deployment, workers: int) -> None:
    """`docker compose up --scale gpu-worker=N`: in the order of the health checks."""
    deployment.up("redis")
    deployment.wait_until_healthy("redis")
    deployment.up("daemon")
    deployment.wait_until_healthy("daemon")
    for _ in range(workers):
        deployment.up("gpu-worker")


def redis_cli(deployment: Deployment, command: str) -> str:
    """The line that the documentation gives, with another command."""
    (line,) = re.findall(r"docker compose exec redis sh -c '(.*) SET selfpruner:docker:control pause'", GUIDE)
    return deployment.execute("redis", "sh", "-c", f"{line} -p {deployment.ports['redis:6379']} {command}")


def status(deployment: Deployment) -> dict[str, Any]:
    answer = json.loads(deployment.execute("daemon", "selfpruner", "status", "--search", "tiny", "--json"))
    assert isinstance(answer, dict)
    return answer


async def test_the_services_run_a_search_scale_to_three_workers_stop_in_order_and_go_on(
    deployment: Deployment, llm: ScriptedLlm
) -> None:
    applied = "LRANGE selfpruner:tiny:applied 0 -1"
    up(deployment, workers=1)

    await eventually(lambda: len(redis_cli(deployment, applied).split()) >= 3, 120)
    assert redis_cli(deployment, "SET selfpruner:tiny:control pause") == "OK\n"
    deployment.up("gpu-worker")
    deployment.up("gpu-worker")

    async def three_are_idle() -> bool:
        return [worker["stage"] for worker in (await status_over_http(deployment))["workers"]] == ["idle"] * 3

    await eventually(three_are_idle, 120)
    deployment.execute("daemon", "selfpruner", "resume", "--search", "tiny")
    assert status(deployment)["control"] == "run"
    assert (await over_http(deployment, HTTP_TOKEN), await over_http(deployment, "another-token-1234")) == (200, 401)

    before = redis_cli(deployment, applied).split()
    assert deployment.stop() == {"daemon": [143], "gpu-worker": [0, 0, 0], "redis": [0]}
    assert deployment.left_behind() == []

    up(deployment, workers=3)
    assert redis_cli(deployment, applied).split()[: len(before)] == before

    await eventually(lambda: '"event": "stays"' in daemon(deployment).stdout, 180)
    check_the_daemon_stays(deployment)
    assert (await over_http(deployment, HTTP_TOKEN), await over_http(deployment, "another-token-1234")) == (200, 401)
    found = status(deployment)
    assert found["finished"] and found["daemon"] is None
    assert found["endpoints"]["dead"]["errors"] > 0 and found["endpoints"]["llm"]["requests"] > 0
    assert (found["candidates"], found["waiting"], found["failed"]) == (CANDIDATES, 0, 0)
    check_no_command_was_refused(deployment)
    check_processes_hide_secrets(deployment)
    assert deployment.stop() == {"daemon": [0], "gpu-worker": [0, 0, 0], "redis": [0]}
    assert deployment.left_behind() == []

    assert {asked.headers["Authorization"] for asked in llm.asked} == {f"Bearer {API_KEY}"}
    check_logs(deployment)


@asynccontextmanager
async def asked_over_http(deployment: Deployment, token: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer where the documentation's line asks."""
    (path,) = set(re.findall(r"^curl -H .* http://127.0.0.1:8090(/\S+)$", GUIDE, re.MULTILINE))
    url = f"http://127.0.0.1:{deployment.ports['daemon:8090']}{path}"
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as client,
        client.get(url) as response,
    ):
        yield response


async def over_http(deployment: Deployment, token: str) -> int:
    async with asked_over_http(deployment, token) as response:
        return response.status


async def status_over_http(deployment: Deployment) -> dict[str, Any]:
    """What `status` shows, without a process that takes the cores from the services."""
    async with asked_over_http(deployment, HTTP_TOKEN) as response:
        answer: dict[str, Any] = await response.json()
        return answer


def daemon(deployment: Deployment) -> Container:
    """The daemon that was started last."""
    return next(c for c in reversed(deployment.containers) if c.service == "daemon")


def check_the_daemon_stays(deployment: Deployment) -> None:
    """When the search has ended: healthy, so that it is not started again, and there for `exec`."""
    deployment.wait_until_healthy("daemon")
    assert daemon(deployment).process.poll() is None
    assert json.loads(daemon(deployment).stdout.splitlines()[-1])["event"] == "stays"
    (line,) = re.findall(r"^docker compose run --rm daemon (best .*?)\s+#", GUIDE, re.MULTILINE)
    flags = line.replace("docker", "tiny").split()
    best = json.loads(deployment.execute("daemon", "selfpruner", *flags, "--json"))
    assert best["search"] == "tiny"


def check_no_command_was_refused(deployment: Deployment) -> None:
    """The user of the ACL may do all that the services did, and no more than is listed."""
    info = redis_cli(deployment, "INFO commandstats")
    assert "cmdstat_evalsha" in info and "errorstat_NOPERM" not in redis_cli(deployment, "INFO errorstats")
    assert not re.findall(r"cmdstat_(\S+?):.*rejected_calls=[1-9]", info)
    for forbidden in ("FLUSHALL", "CONFIG GET dir", "KEYS x*", "ACL LIST", "SET other:key 1"):
        assert redis_cli(deployment, forbidden).startswith("NOPERM"), forbidden


def check_processes_hide_secrets(deployment: Deployment) -> None:
    """What other users of the machine can list (arguments), and what a child inherits (the environment)."""
    for container in deployment.containers:
        if container.process.poll() is None:
            process = psutil.Process(container.process.pid)
            shown = "\n".join([*process.cmdline(), *process.environ().values()])
            assert not any(secret in shown for secret in SECRETS.values() if secret), container.service


def check_logs(deployment: Deployment) -> None:
    """One JSON object a line on stdout, which nothing else is on, and no secret in anything that was written."""
    for container in deployment.containers:
        if container.service == "redis":
            continue
        lines = [json.loads(line) for line in container.stdout.splitlines()]
        assert lines and all({"event", "level", "timestamp"} <= line.keys() for line in lines)
        assert all(line["search"] == "tiny" for line in lines)
        assert container.stderr == ""
        if container.service == "gpu-worker":
            assert len({line["worker"] for line in lines}) == 1
    written = deployment.everything_written()
    assert '"event": "search_ended"' in written and "outcome_committed" in written
    for secret in SECRETS.values():
        assert not secret or secret not in written
