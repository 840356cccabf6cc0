"""Rules of the repository: allowed imports, the content of a wheel, and an up-to-date page of the layout."""

import os
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.house import PACKAGES, arrows, file_imports, first_sentence, layout, modules
from tests.support.root import ROOT


def modules_after_importing(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", ["daemon.search.search", "daemon.launch.launch", "daemon.cli", "agents.mutator", "protocol.queue.streams"]
)
def test_the_daemons_side_loads_neither_torch_nor_trackers(module: str) -> None:
    modules = modules_after_importing(module)
    assert not {"torch", "transformers", "datasets", "gpu_worker"} & modules
    assert not {"tensorboard", "mlflow", "wandb", "trackio"} & modules


def test_the_agents_never_load_redis() -> None:
    names = modules_after_importing("agents.mutator, agents.selector, agents.population.keeper, agents.llm.chat")
    assert not {"redis", "daemon", "gpu_worker"} & names


def test_the_worker_parent_loads_neither_torch_nor_openai_nor_the_daemon() -> None:
    assert not {"torch", "openai", "daemon", "agents"} & modules_after_importing("gpu_worker.worker.worker")


def test_exported_folders_are_described_without_the_workers_packages() -> None:
    modules = modules_after_importing("gpu_worker.export.card_measurement, gpu_worker.speed.engines")
    assert not {"torch", "safetensors", "transformers"} & modules


def test_protocol_loads_no_other_package_of_ours() -> None:
    names = modules_after_importing(
        "protocol.queue.streams, protocol.plans.spec, protocol.runtime.logs, protocol.queue.control"
    )
    assert not {"torch", "openai", "aiohttp", "agents", "daemon", "gpu_worker"} & names


def test_commands_that_ask_no_llm_do_not_wait_for_openai_to_load() -> None:
    assert "openai" not in modules_after_importing("daemon.cli")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch\n", "only gpu_worker loads models"),
        ("from gpu_worker.progress import steps\n", "`gpu_worker` is banned at the module level"),
        ("def command():\n    from gpu_worker.progress import steps\n", "All checks passed!"),
    ],
)
def test_ruff_refuses_a_forbidden_import(source: str, message: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID"]
    command += ["--stdin-filename", "daemon/example.py", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT)
    assert message in done.stdout


def test_a_wheel_carries_prompts_configs_and_scripts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"configs/quickstart.yaml", "protocol/lua/enqueue.lua", "daemon/cli.py"} <= names
    assert {"gpu_worker/models/modeling_pruned.py.j2", "gpu_worker/export/card.md.j2"} <= names
    assert any(re.fullmatch(r"prompts/.+\.j2", name) for name in names)


def table_of_wings() -> dict[str, set[str]]:
    """The table of docs/how-it-works/architecture.md: wing -> wings that it imports."""
    text = (ROOT / "docs" / "how-it-works" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([a-z_/]+)` \| [^|]+ \| ([^|]+) \|$", text.partition("## Wings")[2], re.MULTILINE)
    return {wing: set(re.findall(r"`([a-z_/]+)`", imports)) for wing, imports in rows}


def test_each_wing_imports_what_its_row_of_the_table_says() -> None:
    drawn = {
        wing: {other for other in others if wing.startswith("protocol") or not other.startswith("protocol")}
        for wing, others in arrows().items()
    }
    table = table_of_wings()
    for wing in table | drawn:
        assert drawn.get(wing, set()) - {"protocol"} == table.get(wing), wing


def test_no_files_import_each_other_in_a_circle() -> None:
    """Neither do wings, except for the command line, which loads the worker's side in function bodies."""
    wings = {wing: others - {"daemon", "gpu_worker"} for wing, others in table_of_wings().items()}
    list(TopologicalSorter(wings).static_order())
    list(TopologicalSorter(file_imports()).static_order())


def test_the_page_of_the_layout_is_up_to_date() -> None:
    """After a change, renew it with `RENEW_GOLDEN=1 pytest tests/test_house.py`."""
    page = ROOT / "docs" / "reference" / "layout.md"
    if os.environ.get("RENEW_GOLDEN"):
        page.write_text(layout())
    assert page.read_text() == layout()


def test_each_wing_says_what_it_is_for() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert first_sentence(path), path
