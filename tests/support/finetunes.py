"""Exported folders of tiny models, to be fine-tuned on a text that is easy to learn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gpu_worker.export.writer import ExportContent, export_model
from gpu_worker.finetune.eval_texts import EvalText
from gpu_worker.finetune.finetune import FinetuneRequest, finetune_once
from gpu_worker.models.loading import load_model
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.results.commands import FinetuneResult
from protocol.results.finetuning import Recipe
from protocol.results.formats import Destination, Format
from tests.support.exports import facts_of, pruned
from tests.support.tiny_models import byte_tokenizer, tiny_model, tiny_windows

WORDS = "the cat sat on the mat and the dog sat on the log. "
QUICK = Recipe(learning_rate=0.02, batch=4, micro_batch=2, seqlen=32, max_steps=12, epochs=20)
"""A few steps that are enough for a tiny model to learn something of WORDS."""


def exported(out: Path, family: str = "llama", fmt: Format = "hf", **options: Any) -> Path:
    """A tiny model that is pruned unevenly, with a tokenizer, as an exported folder in fp32."""
    model = replace(pruned(tiny_model(family, **options)), tokenizer=byte_tokenizer())
    text = TextSpec(source="text.txt", windows=4, seqlen=32)
    spec = SearchSpec(model="someone/some-model", rate=0.3, calibration=text, fitness=text, dtype="float32")
    facts = facts_of(model, spec=spec, dense=None, pruned=None)
    export_model(ExportContent(model, facts), Destination(out, (fmt,)))
    return out


def text_in(folder: Path, copies: int = 40) -> str:
    """A file of WORDS."""
    file = folder / "words.txt"
    file.write_text(WORDS * copies)
    return str(file)


def other_text_in(folder: Path) -> str:
    """A file of the same words in another order, to be measured on."""
    file = folder / "measured.txt"
    words = WORDS.split(" ")
    file.write_text(" ".join(words[i * 5 % len(words)] for i in range(40 * len(words))))
    return str(file)


def request_of(folder: Path, out: Path, recipe: Recipe = QUICK, **changes: Any) -> FinetuneRequest:
    """A request to fine-tune `folder` on WORDS, measured on another text of these words."""
    text, measured = text_in(folder.parent), other_text_in(folder.parent)
    return replace(FinetuneRequest(folder, text, recipe, out, eval_text=EvalText(measured, 4, 32)), **changes)


def finetuned(folder: Path, out: Path, recipe: Recipe = QUICK, **changes: Any) -> FinetuneResult:
    """Fine-tune `folder` and return the result; see `request_of`."""
    return finetune_once(request_of(folder, out, recipe, **changes))


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits_in(folder: Path) -> Tensor:
    """Return the logits of a folder's model on two texts."""
    with torch.no_grad():
        logits: Tensor = load_model(str(folder), "float32").causal_lm(input_ids=tiny_windows(2, 24)).logits
    return logits
