"""The imports between the wings of the code, and the page of the repository's layout."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.root import ROOT

PACKAGES = ("protocol", "agents", "daemon", "gpu_worker", "selfpruner")


def modules(package: str) -> list[Path]:
    """The Python files of a package, relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))


def wing_of(name: str) -> str:
    """The wing of a dotted name: `agents/llm` for `agents.llm.chat`, `agents` for `agents.mutator`."""
    package, _, rest = name.partition(".")
    wing = rest.partition(".")[0]
    return f"{package}/{wing}" if wing and (ROOT / package / wing).is_dir() else package


def imports(path: Path) -> Iterator[str]:
    """The dotted names of our packages that a file imports, at its top or in functions."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in found if name.partition(".")[0] in PACKAGES)


def arrows() -> dict[str, dict[str, set[Path]]]:
    """For each wing the wings that it imports, with the files that do."""
    found: dict[str, dict[str, set[Path]]] = {}
    for package in PACKAGES:
        for path in modules(package):
            wing = wing_of(".".join(path.with_suffix("").parts))
            for name in imports(path):
                if (other := wing_of(name)) != wing:
                    found.setdefault(wing, {}).setdefault(other, set()).add(path)
    return found


def file_imports() -> dict[str, set[str]]:
    """For each module the modules of ours that it imports."""
    files = {".".join(path.with_suffix("").parts): path for package in PACKAGES for path in modules(package)}
    found = {}
    for module, path in files.items():
        names = {name if name in files else name.rpartition(".")[0] for name in imports(path)}
        found[module] = (names & files.keys()) - {module}
    return found


def layout() -> str:
    """Each wing and each of its files, with the first sentence of its docstring."""
    lines: list[str] = [
        "# Layout",
        "",
        "Every wing and file with the sentence that it begins with. This page is generated: see tests/test_house.py.",
        "[Architecture](../how-it-works/architecture.md) says which wing imports which.",
    ]
    for package in (*PACKAGES, "benchmarks"):
        folder = ""
        for path in sorted(
            modules(package), key=lambda path: (path.parent.parts, path.name != "__init__.py", path.name)
        ):
            if str(path.parent) != folder:
                folder = str(path.parent)
                lines += ["", f"## {folder}/", ""]
                if path.name == "__init__.py":
                    lines += [first_paragraph(path), ""]
                lines += ["| file | what it holds |", "| --- | --- |"]
            if path.name != "__init__.py":
                lines.append(f"| `{path.name}` | {first_sentence(path)} |")
    lines += ["", "## protocol/lua/", "", "Scripts that change Redis in one step, each without harm if repeated.", ""]
    lines += ["| file | what it holds |", "| --- | --- |"]
    for script in sorted((ROOT / "protocol/lua").glob("*.lua")):
        lines.append(f"| `{script.name}` | {first_comment(script)} |")
    lines += ["", "## prompts/", "", "Templates of the prompts: `AGENT_REPLY.j2` for each agent and each `llm.reply`."]
    lines += ["`system.j2` begins every conversation, `reask.j2` explains an invalid reply, and files with a leading"]
    lines += ["underscore are parts of others."]
    return "\n".join(lines).strip() + "\n"


def first_comment(script: Path) -> str:
    """The first sentence of a script, without its full stop."""
    comment = " ".join(line.removeprefix("-- ") for line in script.read_text().partition("-- KEYS")[0].splitlines())
    return comment.split(". ")[0].rstrip(".")


def first_paragraph(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    return first_paragraph(path).partition(". ")[0].rstrip(".:")
