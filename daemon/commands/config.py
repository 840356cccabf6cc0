"""`selfpruner config`: show the settings of a file with all defaults, or their JSON schema."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.commands import flags
from daemon.commands.output import print_json
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from protocol.errors import SettingsError


def config(
    file: Annotated[Path | None, typer.Argument(help="YAML file of settings.")] = None,
    set_: flags.Set = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of settings, for editors.")] = False,
) -> None:
    """Print all settings of a file as JSON, with defaults and without keys, or the JSON schema for editors."""
    if schema:
        print_json(Settings.model_json_schema())
    elif file is None:
        raise SettingsError("name a file of settings, or give --schema")
    else:
        print_json(load(file, set_ or [], several_rates=True).shown())
