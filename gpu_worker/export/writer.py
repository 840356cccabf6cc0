"""Writes the folder of a pruned model: the model in one format, a GGUF file if requested, the card and the facts."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpu_worker.export.auxiliary_files import write_json
from gpu_worker.export.card import render_card
from gpu_worker.export.facts import ExportFacts, version_of_selfpruner, without_folders
from gpu_worker.export.folder import write_folder
from gpu_worker.export.hf import write_hf
from gpu_worker.export.padded import write_padded
from gpu_worker.export.weights import SHARD_SIZE
from gpu_worker.llama_cpp.check import measure_gguf
from gpu_worker.llama_cpp.writer import check_gguf, write_gguf
from gpu_worker.measuring.self_text import save_text
from gpu_worker.models.loading import LoadedModel
from gpu_worker.models.machine import gigabytes, main_memory
from gpu_worker.models.modeling import dense_type, modeling_of
from gpu_worker.progress import Progress, no_progress
from protocol.errors import ModelError
from protocol.results.commands import GgufPerplexity
from protocol.results.formats import FACTS, SEARCH_CHARTS, Destination, Format, Formats, GgufType


@dataclass(frozen=True)
class ExportContent:
    """The model, facts and tokens that an export is written from."""

    model: LoadedModel
    """The model, pruned to the plan in `facts`."""
    facts: ExportFacts
    windows: Tensor | None = None
    """The tokens (int64, [n, seqlen]) of the perplexity; a GGUF file is measured in llama.cpp on the first windows."""
    saves_windows: bool = False
    """Whether `windows` are saved in the folder, because the dense model generated them."""


def export_model(
    content: ExportContent, destination: Destination, progress: Progress = no_progress
) -> GgufPerplexity | None:
    """Write the folder atomically, and return the perplexity of its GGUF file, if any.

    Raises ModelError if the format does not support the model's family, or if llama.cpp measures another perplexity for
    the GGUF file than the model has in memory. Raises ExportError if the folder exists (`force` replaces an older
    export) or cannot be written.
    """
    found = None

    def write(folder: Path) -> None:
        nonlocal found
        found = write_files(folder, content, destination, progress)

    write_folder(destination.folder, write, force=destination.force)
    return found


def write_files(
    folder: Path, content: ExportContent, destination: Destination, progress: Progress
) -> GgufPerplexity | None:
    """Write all files of an export into the empty `folder`; see `export_model`."""
    name, formats = destination.folder.expanduser().resolve().name, destination.formats
    model, plan, gguf_type = content.model, content.facts.plan, destination.gguf_type
    gguf: Path | None = None
    found: GgufPerplexity | None = None
    for fmt in formats:
        if fmt == "hf":
            write_hf(model, plan, folder, progress)
        elif fmt == "padded":
            write_padded(model, plan, folder, progress)
        else:
            gguf = write_gguf(model, plan, folder, file_type=gguf_type, name=name, progress=progress)
    if gguf is not None and content.windows is not None:
        found = measure_gguf(gguf, model, content.windows, gguf_type, progress)
    facts = content.facts.model_copy(update={"gguf": found})
    if content.saves_windows and content.windows is not None and formats != ("gguf",):
        save_text(content.windows, folder)
    card = render_card(facts, formats, name=name, gguf=None if gguf is None else gguf.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    charts = facts.searched.charts if facts.searched else {}
    for chart in SEARCH_CHARTS:
        if chart in charts:
            (folder / chart).write_text(charts[chart], encoding="utf-8")
    write_json(folder / FACTS, _facts_json(facts, formats))
    return found


def check_formats(model: LoadedModel, formats: Formats, gguf_type: GgufType = "f16") -> None:
    """Raise ModelError if one of `formats` does not support this model; call this before the slow stages.

    Also raises it if memory is too small to write the model, or if this machine cannot produce `gguf_type`.
    """
    for fmt in formats:
        if fmt == "gguf":
            check_gguf(model, gguf_type)
        else:
            modeling_of(dense_type(model.causal_lm.config), fmt)
            _check_memory(model, fmt)


def _check_memory(model: LoadedModel, fmt: Format) -> None:
    """Raise ModelError if main memory is too small for a shard of a model that is on GPUs.

    Shards are built in main memory. Tensors that are already there are mostly written without a copy.
    """
    needed = min(SHARD_SIZE, sum(p.nbytes for p in model.causal_lm.parameters()))
    available = main_memory()
    if model.device.type != "cpu" and needed > available:
        raise ModelError(
            f"writing the format {fmt} needs about {gigabytes(needed)} of main memory where {gigabytes(available)} are "
            "available; use a machine with more, or the format gguf"
        )


def _facts_json(facts: ExportFacts, formats: Formats) -> dict[str, object]:
    """Return the content of selfpruner.json."""
    spec = without_folders(facts.spec).model_copy(update={"model": facts.base_name})
    return {
        "selfpruner": version_of_selfpruner(),
        "format": formats[0],
        "formats": formats,
        "parameters": facts.parameters.model_dump(),
        **facts.model_copy(update={"base_model": facts.base_name, "spec": spec}).model_dump(mode="json"),
    }
