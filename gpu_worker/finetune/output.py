"""Writes the output folder of fine-tuning: the model in each format, and the losses."""

import logging
from importlib.util import find_spec
from pathlib import Path

from gpu_worker.export.auxiliary_files import write_json
from gpu_worker.export.folder import write_folder
from gpu_worker.export.writer import ExportContent, write_files
from gpu_worker.finetune.checkpoint import State
from gpu_worker.progress import Progress
from protocol.results.commands import GgufPerplexity
from protocol.results.finetuning import LossPoint
from protocol.results.formats import Destination

LOSSES = "finetune.json"
CURVE = "loss.png"


def write_output(
    content: ExportContent, destination: Destination, state: State, progress: Progress
) -> tuple[dict[str, int], GgufPerplexity | None]:
    """Write the folder atomically. Raises ExportError.

    Returns the sizes of the folder's files in bytes, and the perplexity of its GGUF file, if any.
    """
    gguf = None

    def write(folder: Path) -> None:
        nonlocal gguf
        gguf = write_files(folder, content, destination, progress)
        tuned = content.facts.finetunings[-1].model_dump(mode="json")
        write_json(folder / LOSSES, tuned | {"losses": [point.model_dump() for point in state.losses]})
        if find_spec("matplotlib") is not None:
            _draw(state.losses, folder / CURVE)

    write_folder(destination.folder, write, force=destination.force)
    found = sorted(file for file in destination.folder.rglob("*") if file.is_file())
    return {str(file.relative_to(destination.folder)): file.stat().st_size for file in found}, gguf


def _draw(losses: tuple[LossPoint, ...], file: Path) -> None:
    """Plot the loss of each step."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # matplotlib logs each cache that it creates
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot([point.step for point in losses], [point.loss for point in losses], linewidth=1)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(file, dpi=120)
