"""`selfpruner push`: upload an exported folder to the Hugging Face Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.commands import flags
from daemon.commands.output import print_result
from daemon.settings.packages import need
from protocol.runtime.paths import expanded

if TYPE_CHECKING:
    from protocol.results.commands import PushResult


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that `export` or `prune` wrote.", callback=expanded)],
    repository: Annotated[str, typer.Argument(help="USER/NAME on the Hugging Face Hub; created if it is missing.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public, not private.")] = False,
    license_: Annotated[
        str | None, typer.Option("--license", help="License of the base model, for the card, such as `llama3.1`.")
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Upload an exported model to the Hugging Face Hub, with its card and its figures.

    Needs a token that may write, in HF_TOKEN or from `hf auth login`.
    """
    from gpu_worker.export.folder import formats_in

    formats_in(folder)  # now, because its packages take seconds to import
    need("huggingface_hub", "worker")
    from gpu_worker.export.push import push_once

    result = push_once(folder, repository, public=public, license_=license_)
    print_result(result.model_dump(mode="json"), json_, lambda: _lines(result))


def _lines(result: "PushResult") -> Iterator[str]:
    yield f"{result.url}: {result.files} files, {result.bytes / 1e6:,.1f} MB"
    if not result.public:
        yield "a new repository is private; --public, or its settings on the hub, change that"
