"""Exports of tiny models, loaded again in a process with torch and transformers but without our packages."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_worker.export.facts import ExportFacts, TextPerplexity
from gpu_worker.export.writer import ExportContent, export_model
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import Plan
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.results.formats import Destination, Format
from tests.support.pruned_models import keep, scores_of
from tests.support.tiny_models import byte_tokenizer

UNEVEN = keep((2, 1, 20), (3, 1, 48), (1, 2, 7))
"""For a tiny model: fewer KV heads and query heads, fewer query heads alone, fewer KV heads alone."""

LOADER = Path(__file__).with_name("load_export.py")


def pruned(model: LoadedModel, plan: Plan = UNEVEN) -> LoadedModel:
    """Prune the model to `plan` in place and return it."""
    OrderedModel(model.decoder, scores_of(model)).apply(plan)
    return model


def with_tokenizer(model: LoadedModel) -> LoadedModel:
    """Give the model a tokenizer with one token per byte and return it."""
    return dataclasses.replace(model, tokenizer=byte_tokenizer())


def laid_out_as_in_a_file(model: LoadedModel) -> None:
    """Make transposed weights contiguous: multiplied in another layout, bfloat16 rounds differently."""
    for parameter in model.causal_lm.parameters():
        parameter.data = parameter.data.contiguous()


def facts_of(model: LoadedModel, plan: Plan = UNEVEN, **changes: Any) -> ExportFacts:
    """Return the facts of a uniform export of `model`, with `changes`."""
    spec = SearchSpec(
        model="someone/some-model",
        rate=0.3,
        calibration=TextSpec(source="/home/somebody/notes.txt", windows=16, seqlen=512),
        fitness=TextSpec(source="wikitext2", windows=8, seqlen=512),
        report=TextSpec(source="self", windows=None, seqlen=1024),
    )
    facts = {
        "base_model": "someone/some-model",
        "method": "uniform",
        "rates": (0.3,) * len(model.decoder.shape.layers),
        "spec": spec,
        "text_numbers": changes.get("spec", spec).text_numbers,
        "shape": model.decoder.shape,
        "plan": plan,
        "dense": TextPerplexity(perplexity=12.3456, tokens=4088),
        "pruned": TextPerplexity(perplexity=23.4567, tokens=4088),
    }
    return ExportFacts.model_validate(facts | changes)


def export(model: LoadedModel, fmt: Format, out: Path, plan: Plan = UNEVEN, *, force: bool = False) -> Path:
    """Export `model`, which is pruned to `plan`; returns the folder."""
    export_model(ExportContent(model, facts_of(model, plan)), Destination(out, (fmt,), force=force))
    return out


def loaded_elsewhere(folders: Sequence[Path], tokens: Tensor, scratch: Path) -> dict[Path, dict[str, Any]]:
    """Run `load_export.py` on the folders without our packages, modules cached in `scratch`; return its results."""
    torch.save(tokens, scratch / "tokens.pt")
    command = [sys.executable, str(LOADER), str(scratch / "tokens.pt"), str(scratch / "results.pt"), *map(str, folders)]
    environment = os.environ | {"HF_HOME": str(scratch / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, Any]] = torch.load(scratch / "results.pt")
    return {folder: results[str(folder)] for folder in folders}
