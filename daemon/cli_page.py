"""`python -m daemon.cli_page > docs/reference/cli.md`: the reference of all commands, from the command line itself."""

import sys
from collections.abc import Callable
from inspect import signature
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from daemon.cli import app

HEAD = """# Command line

<!-- Made by `python -m daemon.cli_page > docs/reference/cli.md`; change the help texts of the commands instead. -->

Every command prints this help with `--help`. [Output and files](output.md) describes exit codes, JSON and folders.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    callbacks = {
        command.callback.__name__.strip("_"): command.callback
        for command in app.registered_commands
        if command.callback
    }
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    return "\n".join([HEAD, *(_section(name, commands[name], callbacks) for name in commands)])


def _section(name: str, command: Any, callbacks: dict[str, Callable[..., Any]]) -> str:
    hints = signature(callbacks[name.replace("-", "_")]).parameters
    arguments = [shown for shown in command.params if shown.param_type_name == "argument"]
    usage = " ".join(["selfpruner", name, *(_usage(argument) for argument in arguments), "[OPTIONS]"])
    rows = ["| argument or option | default | what it does |", "| --- | --- | --- |"]
    rows += [_row(shown, hints[shown.name].annotation) for shown in command.params]
    return f"## {name}\n\n```text\n{usage}\n```\n\n{command.help.strip()}\n\n" + "\n".join(rows) + "\n"


def _usage(argument: Any) -> str:
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _row(shown: Any, hint: Any) -> str:
    names = [shown.name.upper()] if shown.param_type_name == "argument" else shown.opts
    sentence = " ".join((shown.help or "").split()).replace("|", "\\|")
    if (values := _choices(hint)) and not all(value in sentence for value in values):
        sentence += " One of " + ", ".join(f"`{value}`" for value in values) + "."
    if shown.envvar:
        sentence += f" Environment: `{shown.envvar}`."
    return f"| {', '.join(f'`{name}`' for name in names)} | {_default(shown)} | {sentence.strip()} |"


def _default(shown: Any) -> str:
    if shown.required:
        return "must be given"
    return "" if shown.default is None or shown.default is False else f"`{shown.default}`"


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values of a Literal, also inside Annotated, Optional and list."""
    if get_origin(hint) is Literal:
        return tuple(str(value) for value in get_args(hint))
    if get_origin(hint) in (Annotated, Union, UnionType, list):
        return next((found for inner in get_args(hint) if (found := _choices(inner))), ())
    return ()


if __name__ == "__main__":
    sys.stdout.write(page())
