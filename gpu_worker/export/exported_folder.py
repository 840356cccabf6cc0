"""Reads an exported folder: its facts, and its model with the pruned sizes."""

from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_worker.export.facts import ExportFacts, read_facts
from gpu_worker.export.folder import formats_in
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.errors import ModelError
from protocol.plans.plan import Plan
from protocol.plans.shape import LayerShape
from protocol.results.formats import FACTS, SAVED_TEXT, Format, Formats


@dataclass(frozen=True)
class ExportedFolder:
    """A folder that `selfpruner export` wrote."""

    folder: Path
    format: Format
    """The format that is loaded."""
    formats: Formats
    """All formats in the folder."""
    facts: ExportFacts

    @property
    def saved_text(self) -> Path | None:
        """Return the file with the tokens that the export was measured on, if the dense model wrote them."""
        file = self.folder / SAVED_TEXT
        return file if file.is_file() else None


def read_exported(folder: Path) -> ExportedFolder:
    """Read the folder's facts. Raises ModelError if it is not an export or cannot be loaded again."""
    formats = formats_in(folder)
    facts, fmt = read_facts(folder), formats[0]
    if fmt == "gguf":
        raise ModelError(
            f"the folder {str(folder)!r} is an export for llama.cpp, whose weights are no longer those of the model; "
            "pass the hf or the padded export of the same model"
        )
    return ExportedFolder(folder, fmt, formats, facts)


def restore_pruned_sizes(model: LoadedModel, exported: ExportedFolder) -> None:
    """Cut the zeros off a padded model, so that it has the sizes of its plan; for other formats, check the sizes.

    `model.decoder.shape` keeps the sizes of the loaded model. Raises ModelError for a model of another plan.
    """
    plan = exported.facts.plan
    wanted = exported.facts.shape.layers if exported.format == "padded" else pruned_sizes(plan)
    if model.decoder.shape.layers != wanted:
        raise ModelError(f"the weights in {exported.folder} have other sizes than its {FACTS} says")
    if exported.format == "padded":
        _cut(model, plan)


def pruned_sizes(plan: Plan) -> tuple[LayerShape, ...]:
    """Return the sizes of each layer of a model that is pruned to `plan`."""
    return tuple(
        LayerShape(query_heads=kept.query_heads, kv_heads=kept.kv_heads, mlp_channels=kept.mlp_channels)
        for kept in plan.layers
    )


def _cut(model: LoadedModel, plan: Plan) -> None:
    """Keep the first heads and channels. padded.py puts the kept heads and channels first, as in an ordered model."""
    OrderedModel(model.decoder, [_equal_scores(layer) for layer in model.decoder.shape.layers]).apply(plan)
    for layer in model.decoder.layers:
        for linear in layer.linears:
            for parameter in linear.parameters():
                # A copy, so that the OrderedModel can be freed. It is contiguous, as in a file, to compute the same
                # results.
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _equal_scores(layer: LayerShape) -> LayerImportance:
    """Return equal scores, which keep the order."""
    return LayerImportance(
        query_heads=torch.zeros(layer.kv_heads, layer.queries_per_kv),
        kv_heads=torch.zeros(layer.kv_heads),
        channels=torch.zeros(layer.mlp_channels),
    )
