"""What a deployment is made of: the user that Redis has for us, and the Dockerfile."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from protocol.runtime.secret_files import read_secret
from tests.support.root import ROOT

OURS = ("protocol", "daemon", "gpu_worker")
COMMANDS = {
    "delete": "del",
    "incr": "incrby",
    "scan_iter": "scan",
    "xpending_range": "xpending",
    "xgroup_create": "xgroup|create",
}
"""Methods of the client whose command has another name."""
WITH_PARTS = ("XGROUP", "XINFO")
NOT_COMMANDS = {"register_script", "pipeline", "aclose", "execute", "reset", "watch"}
SETTINGS = {"url", "password_file"}
"""Settings of the section `redis`, which look like methods of a client."""
OF_THE_EMBEDDED_SERVER = {"shutdown"}


def allowed_commands() -> set[str]:
    lists = re.findall(r"^\w+='(.*)'$", (ROOT / "deploy" / "redis.sh").read_text(), re.MULTILINE)
    return {word.removeprefix("+") for words in lists for word in words.split()}


def used_commands() -> set[str]:
    """What our scripts and our code call by name."""
    scripts = [path.read_text() for path in (ROOT / "protocol" / "lua").glob("*.lua")]
    calls = [call for text in scripts for call in re.findall(r"redis\.p?call\(\s*'(\w+)'(?:,\s*'(\w+)')?", text)]
    used = {f"{name}|{sub}".lower() if name in WITH_PARTS else name.lower() for name, sub in calls}
    sources = [path.read_text() for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    for text in sources:
        methods = re.findall(r"\b(?:redis|_redis|client|pipe)\s*\.(\w+)\(", text)
        methods += re.findall(r"\bpartial\((?:self\.)?(?:_redis|redis|client)\.(\w+),", text)
        chained = re.findall(r"\)\.([a-z]+)\(", "".join(re.findall(r"^\s*pipe\..*$", text, re.MULTILINE)))
        used |= {COMMANDS.get(name, name) for name in (*methods, *chained)}
    return used - NOT_COMMANDS - SETTINGS - OF_THE_EMBEDDED_SERVER


def test_the_redis_user_may_use_every_command_that_the_code_names() -> None:
    assert {"xadd", "hsetnx", "xreadgroup", "hgetall", "info"} <= used_commands()
    assert used_commands() <= allowed_commands()


def test_the_redis_user_may_use_no_command_that_nobody_needs() -> None:
    of_clients = {"auth", "hello", "select", "client|setinfo", "client|setname", "multi", "exec", "discard"}
    of_scripts = {"evalsha", "script|load", "script|exists"}
    by_users = {"get", "set"}
    assert allowed_commands() - used_commands() <= of_clients | of_scripts | by_users


def start_redis(folder: Path, *, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    """`deploy/redis.sh` with the password file and the users' file of a folder."""
    environment = {"REDIS_PASSWORD_FILE": str(folder / "password"), "REDIS_USERS_FILE": str(folder / "users")}
    script = str(ROOT / "deploy" / "redis.sh")
    return subprocess.run(["sh", script], env=environment | {"PATH": path}, capture_output=True, text=True)


UNUSABLE = {
    b"": "is empty",
    b"\n\n": "is empty",
    b"with-crlf\r\n": "carriage returns (Windows line ends)",
    b"\xef\xbb\xbfwith-bom\n": "one line of ASCII",
    b"with blank\n": "one line of ASCII",
    b" before": "one line of ASCII",
    b"two\nlines\n": "one line of ASCII",
    "nicht-übertragbar\n".encode(): "one line of ASCII",
    b"x" * 2000: "longer than 1,024",
}


@pytest.mark.parametrize(("content", "said"), UNUSABLE.items(), ids=range(len(UNUSABLE)))
def test_redis_refuses_a_password_file_that_others_would_read_differently(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "password").write_bytes(content)
    done = start_redis(tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert "with-" not in done.stderr and not (tmp_path / "users").exists()


def test_redis_says_that_the_password_file_is_missing(tmp_path: Path) -> None:
    done = start_redis(tmp_path)
    assert done.returncode == 2 and "is missing" in done.stderr
    (tmp_path / "password").mkdir()  # what an engine mounts in place of a file that is not there
    assert start_redis(tmp_path).returncode == 2


@pytest.mark.parametrize("password", ["a/b+c==", "#hash", "'quotes\"$(id)`", "back\\slash", "*?[x]", "-n", "%s"])
def test_every_reader_finds_the_same_password_in_the_file(tmp_path: Path, password: str) -> None:
    (tmp_path / "password").write_text(f"{password}\n")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "redis-server"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    done = start_redis(tmp_path, path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    by_health_check = subprocess.run(["sh", "-c", f'printf %s "$(cat {tmp_path / "password"})"'], capture_output=True)
    by_python = read_secret(tmp_path / "password")
    digests = {hashlib.sha256(found).hexdigest() for found in (by_health_check.stdout, by_python.encode())}
    assert digests == set(re.findall(r"#([0-9a-f]{64})", (tmp_path / "users").read_text()))


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint on this machine (it comes with the extra `dev`)")
    done = subprocess.run([hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["daemon", "worker"])
def test_an_image_runs_as_a_user_without_rights_and_gets_its_signals(target: str) -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    (stage,) = [text for text in stages if text.partition("\n")[0].endswith(f" AS {target}")]
    assert re.search(r"^USER 10001:10001$", stage, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["selfpruner"\]$', stage, re.MULTILINE)
    assert re.search(rf'^CMD \["{target}"', stage, re.MULTILINE)


def test_nothing_gets_into_an_image_but_what_is_named() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert allowed == {"pyproject.toml", "README.md", "LICENSE", "prompts", "configs", "agents", "selfpruner", *OURS}


def flags_of(command: str) -> set[str]:
    """The flags of a command, from the page of the command line."""
    page = (ROOT / "docs/reference/cli.md").read_text()
    section = page.split(f"## {command}\n")[1].split("\n## ")[0]
    return set(re.findall(r"--[a-z-]+", section))


def test_the_manifest_fits_the_schemas_of_kubernetes_and_uses_flags_that_exist() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.33", strict=True)
    kinds = Counter(document["kind"] for document in documents)
    assert kinds == {"PersistentVolumeClaim": 2, "Deployment": 3, "Service": 1}
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    for deployment in (d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"):
        (container,), volumes = deployment["containers"], deployment["volumes"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in volumes}
        assert {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v} <= claims
        if "args" in container:  # ours: services would set variables that look like settings
            assert deployment["enableServiceLinks"] is False
        command, *given = container.get("args", ["worker"])
        assert {each for each in given if each.startswith("--")} <= flags_of(command)


@pytest.mark.parametrize("damage", ["", "--time=yesterday"])
def test_slurm_accepts_the_options_of_the_script(tmp_path: Path, damage: str) -> None:
    text = (ROOT / "deploy" / "slurm-workers.sh").read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert set(re.findall(r"--[a-z-]+", text.partition("exec selfpruner worker")[2])) <= flags_of("worker")
    if shutil.which("sbatch") is None:
        pytest.skip("no sbatch on this machine (Debian: slurm-client)")
    options = "ClusterName=x\nSlurmctldHost=127.0.0.1\nAuthType=auth/none\nCredType=cred/none\nGresTypes=gpu\n"
    (tmp_path / "slurm.conf").write_text(options + "MessageTimeout=1\n")
    script = tmp_path / "script.sh"
    script.write_text(text.replace("--time=24:00:00", damage) if damage else text)
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    command = ["sbatch", "--test-only", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    # Without a controller the job cannot be tested further; options are checked before.
    assert ("Invalid --time" in done.stderr) == bool(damage), done.stderr
    assert "unrecognized option" not in done.stderr
    assert damage or "Unable to contact slurm controller" in done.stderr, done.stderr


def metrics_served() -> set[str]:
    """The names of all metrics, as the reference lists them."""
    text = (ROOT / "docs" / "reference" / "http-api.md").read_text()
    rows = text.split("| metric | what it is |")[1].split("\n\n")[0]
    names = {name for row in rows.splitlines()[2:] for name in re.findall(r"`([a-z_]+)", row.split("|")[1])}
    return {f"selfpruner_{name}" for name in names}


def alerts() -> dict[str, str]:
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def panels() -> dict[str, str]:
    """The expressions of the dashboard, with a value for its variable."""
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    return {
        f"panel{panel['id']}{target['refId']}": target["expr"].replace("$instance", "host:8090")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


def test_alerts_and_dashboard_name_metrics_that_are_served() -> None:
    served = metrics_served()
    assert len(served) > 15
    for expression in (*alerts().values(), *panels().values()):
        for name in re.findall(r"selfpruner_[a-z_]+", expression):
            assert name.removesuffix("_bucket") in served, name


def test_prometheus_reads_the_alerts_and_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on this machine (Debian: prometheus)")
    rules = [{"record": f"checked:{name}", "expr": expression} for name, expression in panels().items()]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for each in (ROOT / "deploy" / "prometheus-alerts.yaml", file):
        done = subprocess.run(["promtool", "check", "rules", each], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_an_alert_is_raised_when_a_search_stands_still_and_not_while_it_is_paused(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on this machine (Debian: prometheus)")
    series = {
        "selfpruner_finished": "0x180", "selfpruner_candidates_total": "7x180",
        'selfpruner_workers{stage="preparing"}': "0x180", 'selfpruner_workers{stage="idle"}': "1x180",
    }  # fmt: skip

    summary = {"summary": "no candidate has had an outcome for an hour"}

    def test_of(paused: int) -> dict[str, object]:
        given = series | {"selfpruner_paused": f"{paused}x180"}
        raised = [] if paused else [{"exp_annotations": summary, "exp_labels": {"instance": "h"}}]
        return {
            "interval": "1m",
            "input_series": [{"series": _at_one_host(name), "values": values} for name, values in given.items()],
            "alert_rule_test": [{"eval_time": "2h", "alertname": "SearchStandsStill", "exp_alerts": raised}],
        }

    file = tmp_path / "tests.yaml"
    rules = [str(ROOT / "deploy" / "prometheus-alerts.yaml")]
    file.write_text(
        yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": [test_of(0), test_of(1)]})
    )
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _at_one_host(series: str) -> str:
    name, _, labels = series.partition("{")
    return f'{name}{{instance="h"' + (f", {labels}" if labels else "}")
