"""A whole search under Docker Compose: started, steered, killed, stopped, scaled and copied out as documented.

The tests build on each other and run in this order; the first failure leaves the others nothing to check.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.containers.project import Project, documented_lines, step

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1800)]
SEARCH = {"population": 6, "mutations": 3, "crossovers": 2, "rounds": 4}
CANDIDATES = 6 + 4 * (3 + 2)
SERVICES = ("redis", "daemon", "cpu-worker", "llama-cpp")
REFUSED = (
    "CONFIG GET dir", "FLUSHALL", "KEYS selfpruner:x", "GET other", "SET other:x 1", "XADD other 1-1 a b", "ACL LIST",
    "EVAL x 0", "SCRIPT FLUSH", "SCRIPT KILL", "FUNCTION LIST", "SHUTDOWN NOSAVE", "MONITOR", "MODULE LIST",
    "REPLICAOF 127.0.0.1 1", "CLIENT KILL TYPE normal",
)  # fmt: skip
"""Commands that the search's Redis user must not be able to run."""
SCRIPTS_REFUSED = ("redis.call('SET','other:x',1)", "redis.call('FLUSHALL')", "redis.call('CONFIG','GET','dir')")


def redis_cli(project: Project, command: str) -> str:
    """Run the documented line with another command; returns the server's answer."""
    return project.documented("redis-cli", "pause", instead=("SET selfpruner:docker:control pause", command)).strip()


def applied(project: Project) -> list[str]:
    """The ids of the candidates that were counted, in order."""
    return redis_cli(project, "LRANGE selfpruner:docker:applied 0 -1").split()


def measured_more(project: Project, than: int) -> None:
    """Wait until the search has counted more than this many candidates, or has ended."""
    project.until(lambda: len(applied(project)) > than or bool(status_after_kill(project).get("finished")), 900)


def small_search(project: Project) -> None:
    """Shorten the search of docker.yaml to a few minutes, without other changes."""
    file = project.folder / "configs" / "docker.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["search"] |= SEARCH
    settings["data"] |= {"calibration_windows": 8, "fitness_windows": 2, "seqlen": 64}
    settings["llm"] |= {"max_tokens": 100, "concurrency": 2}
    file.write_text(yaml.safe_dump(settings))


def test_the_images_are_built(project: Project) -> None:
    small_search(project)
    with step("images", "docker compose build, without secrets", "daemon, worker and LLM are built"):
        (project.folder / ".env").write_text("COMPOSE_PROFILES=cpu,local-llm\n")
        project.run("docker compose build daemon cpu-worker")
        project.run("docker compose build llama-cpp")  # from the worker's image


def test_missing_and_unusable_secrets_are_named(project: Project) -> None:
    with step("no secrets", "docker compose up -d", "the missing file is named; exit code 1"):
        done = project.run("docker compose up -d", check=False)
        assert done.returncode == 1 and "secrets/redis_password" in done.stderr
    for line in documented_lines()[:3]:
        project.documented(line)
    with step("an empty Redis password", "the file is emptied, then written again", "one sentence in Redis's log"):
        file = project.folder / "secrets" / "redis_password"
        password = file.read_text()
        file.write_text("")
        project.run("docker compose up -d redis", check=False)
        project.until(lambda: "redis_password is empty: write one with" in project.logs("redis"), 60)
        assert not re.search(r"Ready to accept", project.logs("redis"))
        file.write_text(password)
        project.run("docker compose rm --stop --force redis")


def test_every_choice_of_profiles_is_valid(project: Project) -> None:
    wanted = {
        "gpu,local-llm >": {"redis", "daemon", "gpu-worker", "llama-cpp"},
        "gpu,local-llm-vllm": {"redis", "daemon", "gpu-worker", "vllm"},
        "LLM_BASE_URL": {"redis", "daemon", "gpu-worker"},
        "cpu,local-llm": {"redis", "daemon", "cpu-worker", "llama-cpp"},  # last: the others have no GPU here
    }
    with step("profiles", "each line that writes .env", "it chooses the services that it names"):
        for words, services in wanted.items():
            project.documented(words)
            assert set(project.run("docker compose config --services").stdout.split()) == services


def test_a_search_starts_and_says_how_far_it_is(project: Project) -> None:
    with step("start", "up -d", "candidates are measured; the log shows the seconds left"):
        project.documented("docker compose up -d")
        project.until(lambda: all(c["State"]["Running"] for s in SERVICES for c in project.inspect(s)), 120)
        project.until(lambda: redis_cli(project, "EXISTS selfpruner:docker:applied") == "1", 1200)
        project.until(lambda: status_after_kill(project).get("candidates"), 600)  # the first outcome is the baseline's
        project.documented("logs -f", instead=(" -f", ""))
        lines = [json.loads(line) for line in project.logs("cpu-worker").splitlines()]
        left = [line["seconds_left"] for line in lines if line.get("stage") == "calibrating"]
        assert left[0] is None and left[-1] == 0
        assert project.status()["candidates"] >= 1
    with step("HTTP API", "curl with and without the token", "200 with the status; 401"):
        url = ("127.0.0.1:8090", f"127.0.0.1:{project.port}")
        assert json.loads(project.documented("curl", instead=url))["control"] == "run"
        code = f"curl -s -o /dev/null -w '%{{http_code}}' http://127.0.0.1:{project.port}/api/status"
        assert project.run(code).stdout == "401"


def test_a_pause_survives_a_kill_and_resume_ends_it(project: Project) -> None:
    with step("pause", "redis-cli SET … pause, then Redis and daemon killed", "the search stays paused"):
        assert redis_cli(project, "SET selfpruner:docker:control pause") == "OK"
        project.until(lambda: project.status()["queue"]["running"] == 0, 120)
        before = applied(project)
        for service in ("redis", "daemon"):
            project.kill(service)
        project.until(lambda: status_after_kill(project).get("daemon"), 120)
        assert project.status()["control"] == "pause" and applied(project) == before
    with step("resume", "redis-cli SET … run", "more candidates are measured"):
        project.documented("redis-cli", "control run")
        measured_more(project, len(before))
        project.documented("selfpruner pause")
        assert project.status()["control"] == "pause"
        project.documented("selfpruner pause", instead=(" pause", " resume"))


def status_after_kill(project: Project) -> dict[str, Any]:
    """Return the status; empty while its services restart."""
    done = project.run("docker compose exec -T daemon selfpruner status --json --search docker", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


@pytest.mark.parametrize("service", ["cpu-worker", "daemon", "redis", "llama-cpp"])
def test_the_search_survives_a_kill(project: Project, service: str) -> None:
    with step(f"{service} killed", "SIGKILL of every process in the container", "it starts again; more is measured"):
        before = len(applied(project))
        project.kill(service)
        project.until(lambda: status_after_kill(project).get("daemon"), 120)
        measured_more(project, before)


def test_up_resumes_where_stop_left_off(project: Project) -> None:
    with step("stop, up -d --scale cpu-worker=2", "as documented", "nothing is lost; two workers share the rest"):
        before = applied(project)
        project.documented("docker compose stop")
        assert project.run("docker compose ps --quiet").stdout == ""
        assert [c["State"]["ExitCode"] for c in project.inspect("cpu-worker")] == [0]
        project.documented("--scale")
        project.until(lambda: len(status_after_kill(project).get("workers", ())) == 2, 300)
        assert applied(project)[: len(before)] == before


def test_every_candidate_counts_once(project: Project) -> None:
    with step("end", "after all this", "the search completes, and each candidate counts once"):
        project.until(lambda: status_after_kill(project).get("finished"), 1500)
        found, ids = project.status(), applied(project)
        assert (found["candidates"], found["waiting"], found["dead"]) == (CANDIDATES, 0, [])
        assert len(ids) == len(set(ids))
        project.until(lambda: '"event": "stays"' in project.logs("daemon"), 120)
        assert project.inspect("daemon")[0]["State"]["Running"]


def test_no_service_can_do_more_than_it_needs(project: Project) -> None:
    with step("Redis's user", "other commands and keys, by hand and by script", "the server refuses each of them"):
        for command in REFUSED:
            assert "NOPERM" in redis_cli(project, command), command
        for script in SCRIPTS_REFUSED:
            sha = redis_cli(project, f'SCRIPT LOAD "return {script}"'.replace("'", '\\"'))
            answer = redis_cli(project, f"EVALSHA {sha} 0")
            assert re.search("NOPERM|ACL failure|not allowed", answer), (script, answer)
        without = project.run("docker compose exec -T redis redis-cli PING").stdout
        assert "NOAUTH" in without
    with step("containers", "exec and docker inspect", "no capability, write, way out, public port or secret"):
        secrets = [text for path in (project.folder / "secrets").iterdir() if (text := path.read_text().strip())]
        for service in SERVICES:
            check_container(project, service, secrets)
        routes = project.run("docker compose exec -T redis cat /proc/net/route").stdout.splitlines()[1:]
        assert routes and not any(line.split()[1] == "00000000" for line in routes)


def check_container(project: Project, service: str, secrets: list[str]) -> None:
    shown = json.dumps(project.inspect(service))
    inside = project.run(f"docker compose exec -T {service} sh -c 'cat /proc/*/cmdline /proc/*/environ 2>&1; true'")
    assert not [secret for secret in secrets if secret in shown + inside.stdout], service
    proc = project.run(f"docker compose exec -T {service} cat /proc/1/status").stdout
    assert "CapEff:\t0000000000000000" in proc and "NoNewPrivs:\t1" in proc
    assert not re.search(r"^Uid:\t0\t", proc, re.MULTILINE) or service == "llama-cpp"
    for path in ("/app/x", "/x", "/etc/x"):
        assert project.run(f"docker compose exec -T --user 0 {service} touch {path}", check=False).returncode != 0, path
    for container in project.inspect(service):
        published = [p for ports in container["NetworkSettings"]["Ports"].values() for p in ports or ()]
        assert [p["HostIp"] for p in published] == (["127.0.0.1"] if service == "daemon" else [])


def test_the_result_is_copied_out_and_exported(project: Project) -> None:
    with step("result", "docker compose cp, run --rm daemon best", "best.json; each evaluation once"):
        project.documented("cp daemon:/runs")
        result = project.folder / "result"
        best = json.loads((result / "best.json").read_text())
        lines = [json.loads(line) for line in (result / "evaluations.jsonl").read_text().splitlines()]
        ids = [line["id"] for line in lines]
        assert len(ids) == len(set(ids)) and set(applied(project)) == set(ids)
        assert sum(line["agent"] != "baseline" for line in lines) == CANDIDATES
        assert best["rates"]
    with step("export", "exec cpu-worker selfpruner export, cp", "a folder that transformers loads"):
        project.documented("best.json' <")
        short = "--windows 2 --calibration-windows 8 --seqlen 64 --out"  # else it writes 20,000 tokens first
        project.documented("selfpruner export", instead=("--out", short))
        project.documented("cp cpu-worker:/cache/small")
        check_export(project.folder / "small")
    with step("best, when all is stopped", "stop, then run --rm daemon best", "it answers"):
        project.documented("docker compose stop")
        assert f"{best['perplexity']:,.2f}" in project.documented("daemon best")


def check_export(folder: Path) -> None:
    """Load the folder with torch and transformers only, and check that the model is smaller."""
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(sum(p.numel() for p in model.model.layers.parameters()))
"""
    # Isolated, and in an empty folder, it would still see an editable install of ours: that must not be imported.
    code += "import sys; assert not {'gpu_worker', 'protocol'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    removed = json.loads((folder / "selfpruner.json").read_text())["parameters"]
    assert int(done.stdout) == removed["decoder_after"] < removed["decoder_before"]


def test_a_settings_file_that_does_not_exist_is_named_once(project: Project) -> None:
    with step("an unknown SEARCH_CONFIG", "up -d", "daemon and worker say so once, and wait"):
        project.run("docker compose up -d", SEARCH_CONFIG="nope.yaml")
        for service in ("daemon", "cpu-worker"):
            project.until(lambda service=service: "invalid_input" in project.logs(service), 120)  # type: ignore[misc]
            assert project.logs(service).count("there is no settings file '/app/configs/nope.yaml'") == 1
            assert all(c["State"]["Running"] and not c["RestartCount"] for c in project.inspect(service))


def test_a_missing_llm_is_named(project: Project) -> None:
    with step("no LLM", "up -d with the profile cpu alone", "the daemon says which endpoint it waits for"):
        project.run("docker compose down && docker volume rm selfpruner-test_redis-data selfpruner-test_runs")
        project.run("docker compose up -d", COMPOSE_PROFILES="cpu")
        project.until(lambda: "endpoint_not_ready" in project.logs("daemon"), 300)
        (said,) = [line for line in project.logs("daemon").splitlines() if "endpoint_not_ready" in line]
        assert {"llm", "start its server"} <= set(re.split(r'"|, ', said))
    assert set(documented_lines()) == project.used
