"""The folder that fine-tuning writes: the model in each format, with the losses beside it."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from gpu_worker.export.checkpoint import write_json
from gpu_worker.export.exporting import fill
from gpu_worker.export.facts import ExportFacts, version_of_selfpruner
from gpu_worker.export.folder import MARK, write_folder
from gpu_worker.finetune.checkpoint import State
from gpu_worker.models import LoadedModel
from gpu_worker.progress import Progress
from protocol.finetuning import LossPoint
from protocol.formats import Format, GgufType

LOSSES = "finetune.json"
CURVE = "loss.png"


@dataclass(frozen=True)
class Output:
    """Where the model goes, and as what: one format in the folder itself, several in a folder of each one's name."""

    folder: Path
    formats: tuple[Format, ...]
    gguf_type: GgufType
    force: bool
    kept_text: Tensor | None
    """Tokens that it was measured on, where nobody else has them."""


def write_output(
    model: LoadedModel, facts: ExportFacts, output: Output, state: State, progress: Progress
) -> dict[str, int]:
    """Write the folder, whole or not at all; returns its files, with their sizes in bytes. Raises ExportError."""

    def write(folder: Path) -> None:
        several = len(output.formats) > 1
        for fmt in output.formats:
            place = folder / fmt if several else folder
            place.mkdir(exist_ok=True)
            name = f"{output.folder.name}/{fmt}" if several else output.folder.name
            fill(
                place,
                model,
                facts.plan,
                facts,
                fmt,
                name=name,
                gguf_type=output.gguf_type,
                kept_text=output.kept_text,
                progress=progress,
            )
        if several:
            write_json(folder / MARK, {"selfpruner": version_of_selfpruner(), "formats": output.formats})
        tuned = facts.finetunings[-1].model_dump(mode="json")
        write_json(folder / LOSSES, tuned | {"losses": [point.model_dump() for point in state.losses]})
        if find_spec("matplotlib") is not None:
            _draw(state.losses, folder / CURVE)

    write_folder(output.folder, write, force=output.force)
    found = sorted(file for file in output.folder.rglob("*") if file.is_file())
    return {str(file.relative_to(output.folder)): file.stat().st_size for file in found}


def _draw(losses: tuple[LossPoint, ...], file: Path) -> None:
    """The loss of each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot([point.step for point in losses], [point.loss for point in losses], linewidth=1)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(file, dpi=120)
