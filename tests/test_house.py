"""The house rules: who may import whom, what a wheel carries, and that the README's tree is true."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.root import ROOT


def modules_after_importing(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", ["daemon.search.search", "daemon.launch.launch", "daemon.cli", "agents.mutator", "protocol.queue.streams"]
)
def test_the_daemons_side_never_loads_torch(module: str) -> None:
    assert not {"torch", "transformers", "datasets", "gpu_worker"} & modules_after_importing(module)


def test_the_agents_never_load_redis() -> None:
    names = modules_after_importing("agents.mutator, agents.selector, agents.population.keeper, agents.llm.chat")
    assert not {"redis", "daemon", "gpu_worker"} & names


def test_the_worker_parent_loads_neither_torch_nor_openai_nor_the_daemon() -> None:
    assert not {"torch", "openai", "daemon", "agents"} & modules_after_importing("gpu_worker.worker.worker")


def test_protocol_loads_nothing_of_the_floors_above() -> None:
    names = modules_after_importing(
        "protocol.queue.streams, protocol.plans.spec, protocol.runtime.logs, protocol.queue.control"
    )
    assert not {"torch", "openai", "aiohttp", "agents", "daemon", "gpu_worker"} & names


def test_commands_that_ask_no_llm_do_not_wait_for_openai_to_load() -> None:
    assert "openai" not in modules_after_importing("daemon.cli")


def test_ruff_refuses_a_forbidden_import(tmp_path: Path) -> None:
    source = "import torch\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251"]
    command += ["--stdin-filename", "daemon/example.py", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "only gpu_worker loads models" in done.stdout


def test_a_wheel_carries_prompts_configs_and_scripts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"configs/quickstart.yaml", "protocol/lua/enqueue.lua", "daemon/cli.py"} <= names
    assert {"gpu_worker/models/modeling_pruned.py.j2", "gpu_worker/export/card.md.j2"} <= names
    assert any(re.fullmatch(r"prompts/.+\.j2", name) for name in names)


def test_every_file_and_folder_of_the_readmes_tree_exists() -> None:
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    named: set[str] = set()
    folder = ""
    for line in block.group(1).splitlines():
        words = re.split(r"\s{2,}", line.strip())[0]
        if line and not line.startswith(" "):
            folder = words.split()[0] if words.split()[0].endswith("/") else ""
            named |= {word for word in words.split() if "." in word or word.endswith("/") or word == "Makefile"}
        else:
            named |= {folder + word for word in words.split() if "." in word or word.endswith("/")}
    assert len(named) > 40
    assert not [name for name in named if not (ROOT / name).exists()]
    modules = {
        str(p.relative_to(ROOT))
        for d in (
            "protocol",
            "agents",
            "daemon",
            "gpu_worker",
            "gpu_worker/export",
            "gpu_worker/finetune",
            "gpu_worker/speed",
        )
        for p in (ROOT / d).glob("*.py")
    }
    assert not {m for m in modules if not m.endswith("__init__.py")} - named
