"""README and docs/: every command, setting, file and key that they name exists, and generated pages are up to date."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from benchmarks.search.plot_quality import DRAWN, read_table
from daemon import cli_page
from daemon.cli import app
from daemon.settings.settings import Settings, setting_names
from daemon.settings.sources import load
from protocol.queue.keys import Keys
from tests.support.root import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = {DOCS / "reference" / name for name in ("cli.md", "configuration.md", "layout.md", "events.md")}
NOTES = DOCS / "lab-notes"
"""What was measured once: a note may name a file or an option that is gone."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def lines(page: Path) -> Iterator[str]:
    """The lines of its shell blocks, continued ones joined, without comments."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"(^|\s)#.*$", "", line)


@cache
def flags() -> dict[str, set[str]]:
    """The options of each command."""
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    return {
        name: {option for shown in command.params if shown.param_type_name == "option" for option in shown.opts}
        for name, command in commands.items()
    }


def commands(line: str) -> Iterator[list[str]]:
    """The words of each call of `selfpruner` in a line, from the command on."""
    words = shlex.split(line)
    if words[:2] == ["kubectl", "create"]:
        return
    while "selfpruner" in words:
        words = words[words.index("selfpruner") + 1 :]
        ends = [i for i, word in enumerate(words) if word in ("&", "|", ";", "&&", ">", "selfpruner")]
        yield words[: min(ends, default=len(words))]


CALLS = [
    (page, call)
    for page in PAGES
    for line in lines(page)
    if re.search(r"(^|[ ;])selfpruner ", line)
    for call in commands(line)
]


@pytest.mark.parametrize(("page", "call"), CALLS, ids=[" ".join(call)[:60] for _, call in CALLS])
def test_a_command_of_the_pages_exists_with_its_options_and_settings(page: Path, call: list[str]) -> None:
    name, *words = call
    assert name in flags(), (page, name)
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= flags()[name], page
    for option, value in pairwise(words):
        if option == "--set":
            assert value.partition("=")[0] in setting_names(), (page, value)


def test_many_commands_are_checked() -> None:
    assert len(CALLS) > 50


def test_modules_and_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python3? -m ([\w.]+)", text):
            assert module.startswith("vllm.") or find_spec(module), (page, module)  # vLLM has its own environment
        for line in lines(page):
            if line.startswith("make "):
                assert line.split()[1] in targets, (page, line)


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(DOCS)], ids=lambda page: page.stem)
def test_settings_of_the_pages_are_accepted(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (first, *_) = yaml.safe_load_all(block)
        if set(first) <= set(Settings.model_fields):
            file = tmp_path / "settings.yaml"
            target = {"model": "smollm2", "rate": 0.3} | first.get("target", {})
            file.write_text(yaml.safe_dump(first | {"target": target}))
            load(file)


def test_files_of_the_pages_exist() -> None:
    for page in PAGES:
        if page.is_relative_to(NOTES) or page in GENERATED:
            continue
        folders = "agents|benchmarks|configs|daemon|deploy|docs|gpu_worker|protocol"
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
            assert (ROOT / name).exists(), (page, name)


def test_pages_that_files_refer_to_exist() -> None:
    folders = ("agents", "benchmarks", "configs", "daemon", "docs", "gpu_worker", "prompts", "protocol", "tests")
    for file in [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]:
        if file.suffix in (".py", ".yaml", ".yml", ".toml", ".md") and not file.is_relative_to(NOTES):
            for name in re.findall(r"\bdocs/[\w./-]+\.md\b", file.read_text()):
                assert (ROOT / name).is_file(), (file, name)


def test_lines_of_prose_have_at_most_120_characters() -> None:
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "<!--"))]
        assert page in GENERATED or not long, (page, long)


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    assert (DOCS / "reference" / "cli.md").read_text() == cli_page.page()


def test_the_page_of_redis_keys_names_every_key() -> None:
    named = set(re.findall(r"^\| `([\w-]+)", (DOCS / "reference" / "redis-keys.md").read_text(), re.MULTILINE))
    keys = Keys("s")
    strings = {name for name, value in vars(Keys).items() if isinstance(value, property)}
    parts = {str(getattr(keys, name)).removeprefix("selfpruner:s:").rstrip(":") for name in strings}
    assert parts | {"self-text"} <= named


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_readme_has_the_figures_of_the_results() -> None:
    results = read_table((DOCS / "results" / "quality.md").read_text())
    assert set(DRAWN) <= set(results)
    readme = re.sub(r"[*]", "", (ROOT / "README.md").read_text())
    for name in DRAWN:
        cells, *_ = re.findall(rf"^\| {name}[^|]*\| ([\d.| ]+) \|$", readme, re.MULTILINE)
        shown = [float(cell) for cell in cells.split("|")]
        assert shown == [float(f"{value:.3g}") for value in results[name]], name
