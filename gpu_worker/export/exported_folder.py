"""An exported folder as something to work on: what it says of itself, and its model as it was pruned."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from gpu_worker.export.facts import ExportFacts
from gpu_worker.export.folder import formats_in
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.errors import ModelError
from protocol.plans.plan import Plan
from protocol.plans.shape import LayerShape
from protocol.results.formats import FACTS, SAVED_TEXT, Format, Formats

NOT_FACTS = ("selfpruner", "format", "formats", "parameters")
"""What selfpruner.json says beside the facts."""


@dataclass(frozen=True)
class ExportedFolder:
    """A folder that `selfpruner export` wrote."""

    folder: Path
    format: Format
    """What is loaded of it."""
    formats: Formats
    """All that lie there."""
    facts: ExportFacts

    @property
    def saved_text(self) -> Path | None:
        """The file with the tokens that it was measured on, where the dense model wrote them."""
        file = self.folder / SAVED_TEXT
        return file if file.is_file() else None


def read_exported(folder: Path) -> ExportedFolder:
    """What the folder says of itself. Raises ModelError where it is no export, or one that cannot be loaded again."""
    file = folder / FACTS
    formats = formats_in(folder)
    try:
        written = json.loads(file.read_bytes())
        fmt = written["format"]
        facts = ExportFacts.model_validate({name: each for name, each in written.items() if name not in NOT_FACTS})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # pydantic's ValidationError is a ValueError, and a page long
        reason = "not what this version writes" if isinstance(error, ValidationError) else str(error)
        raise ModelError(f"{file} does not say what the folder holds ({reason})") from error
    if fmt not in ("hf", "padded"):
        raise ModelError(
            f"the folder {str(folder)!r} is an export for llama.cpp, whose weights are no longer those of the model; "
            "pass the hf or the padded export of the same model"
        )
    return ExportedFolder(folder, fmt, formats, facts)


def restore_pruned_sizes(model: LoadedModel, exported: ExportedFolder) -> None:
    """Cut the noughts off a padded model, so that it has the sizes of its plan; check those of any other.

    The decoder's shape stays that of the model as it was loaded. Raises ModelError for the model of another plan.
    """
    plan = exported.facts.plan
    wanted = exported.facts.shape.layers if exported.format == "padded" else pruned_sizes(plan)
    if model.decoder.shape.layers != wanted:
        raise ModelError(f"the weights in {exported.folder} have other sizes than its {FACTS} says")
    if exported.format == "padded":
        _cut(model, plan)


def pruned_sizes(plan: Plan) -> tuple[LayerShape, ...]:
    """The sizes of a model that is pruned to `plan`, layer by layer."""
    return tuple(
        LayerShape(query_heads=kept.query_heads, kv_heads=kept.kv_heads, mlp_channels=kept.mlp_channels)
        for kept in plan.layers
    )


def _cut(model: LoadedModel, plan: Plan) -> None:
    """What is kept lies in front (padded.py), as if it were ordered by importance already."""
    OrderedModel(model.decoder, [_all_alike(layer) for layer in model.decoder.shape.layers]).apply(plan)
    for layer in model.decoder.layers:
        for linear in layer.linears:
            for parameter in linear.parameters():
                # A copy, so that the whole goes with the OrderedModel; laid out as in a file, to compute the same.
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _all_alike(layer: LayerShape) -> LayerImportance:
    """Scores by which everything stays where it is."""
    return LayerImportance(
        query_heads=torch.zeros(layer.kv_heads, layer.queries_per_kv),
        kv_heads=torch.zeros(layer.kv_heads),
        channels=torch.zeros(layer.mlp_channels),
    )
