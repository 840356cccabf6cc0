"""Text that the dense model writes itself: calibration and fitness data where no corpus can be had."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_worker.cache import cached
from gpu_worker.models import LoadedModel
from gpu_worker.progress import Progress

TEMPERATURE = 1.0
TOP_K = 50
"""Without a limit a small model's tail of unlikely tokens soon derails the text."""
BATCH = 64
"""Windows written at once."""
OPENINGS = (
    "The history of", "In the early", "A new study", "She was born in", "The first", "During the war", "According to",
    "The city of", "Scientists have", "It was", "The film", "In mathematics", "The river", "He began his career",
    "The company", "Most people", "The song", "When the", "Many species of", "The government", "An important",
    "The team", "On the morning of", "The main character",
)  # fmt: skip
"""What the windows begin with, in turn: left to a bare start token an instruction-tuned model writes chat markup."""


def self_text(model: LoadedModel, windows: int, length: int, seed: int, progress: Progress) -> Tensor:
    """Tokens (long, [windows, length]) sampled from the dense model once and kept in the cache."""
    key = (
        f"{model.identity}|{model.causal_lm.dtype}|{model.device.type}|{seed}|{windows}|{length}|{TEMPERATURE}|{TOP_K}"
    )
    name = f"self-text-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def write(folder: Path) -> None:
        save_file({"tokens": sample(model, windows, length, seed, progress)}, folder / "tokens.safetensors")

    return load_file(cached(name, write) / "tokens.safetensors")["tokens"]


def sample(model: LoadedModel, windows: int, length: int, seed: int, progress: Progress) -> Tensor:
    """Sample `windows` texts of `length` tokens at temperature 1 from the 50 likeliest tokens, without special ones."""
    prompts = _prompts(model.tokenizer, length).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        batches = []
        for start in range(0, windows, BATCH):
            rows = torch.arange(start, min(start + BATCH, windows)) % len(prompts)
            batches.append(_continue(model, prompts[rows], length, progress))
    return torch.cat(batches).cpu()


def _prompts(tokenizer: Any, length: int) -> Tensor:
    """The openings as tokens, cut to the shortest of them: without padding all rows stay aligned."""
    ids = [tokenizer(text)["input_ids"] for text in OPENINGS]
    shortest = min(length - 1, *(len(row) for row in ids))
    return torch.tensor([row[:shortest] for row in ids], dtype=torch.long)


def _continue(model: LoadedModel, prompts: Tensor, length: int, progress: Progress) -> Tensor:
    def report(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        progress("writing text", tokens.shape[1], length)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    with torch.inference_mode():
        written = model.causal_lm.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            top_p=1.0,
            max_length=length,
            min_length=length,
            # A special token would end the text, or make the rest of the window another document's.
            suppress_tokens=sorted(model.tokenizer.all_special_ids),
            pad_token_id=model.tokenizer.pad_token_id or 0,
            stopping_criteria=[report],
        )
    return torch.as_tensor(written)
