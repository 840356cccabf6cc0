"""A pruned model as a folder in one of the formats, with its card and its facts."""

from pathlib import Path
from typing import Literal

from gpu_worker.export.card import render_card
from gpu_worker.export.checkpoint import write_json
from gpu_worker.export.facts import ExportFacts, Format, version_of_selfpruner
from gpu_worker.export.folder import MARK, write_folder
from gpu_worker.export.hf import write_hf
from gpu_worker.export.padded import write_padded
from gpu_worker.models import LoadedModel
from protocol.plan import Plan

FileType = Literal["f16", "q8_0"]
"""How a GGUF file holds its matrices: 16 bits, or 8 in blocks."""


def export_model(
    model: LoadedModel,
    plan: Plan,
    facts: ExportFacts,
    fmt: Format,
    out: Path,
    *,
    force: bool,
    file_type: FileType = "f16",
) -> None:
    """Write `model`, which is pruned to `plan`, as the folder `out`: whole, or not at all.

    `file_type` is for the format gguf.

    Raises ModelError for a family that the format does not support, and ExportError where `out` exists (an older
    export is replaced with `force`) or cannot be written.
    """
    name = out.expanduser().resolve().name

    def write(folder: Path) -> None:
        gguf = _write_weights(model, plan, fmt, folder, name, file_type)
        (folder / "README.md").write_text(render_card(facts, fmt, name=name, gguf=gguf), encoding="utf-8")
        write_json(folder / MARK, _marked(facts, fmt))

    write_folder(out, write, force=force)


def _write_weights(
    model: LoadedModel, plan: Plan, fmt: Format, folder: Path, name: str, file_type: FileType
) -> str | None:
    """Write the model in its format; returns the name of the GGUF file where there is one."""
    if fmt == "hf":
        write_hf(model, plan, folder)
    elif fmt == "padded":
        write_padded(model, plan, folder)
    else:
        from gpu_worker.export.gguf import write_gguf

        return write_gguf(model, plan, folder, file_type=file_type, name=name).name
    return None


def _marked(facts: ExportFacts, fmt: Format) -> dict[str, object]:
    """The facts for programs."""
    return {
        "selfpruner": version_of_selfpruner(),
        "format": fmt,
        "parameters": facts.parameters.model_dump(),
        **facts.model_dump(mode="json"),
    }
