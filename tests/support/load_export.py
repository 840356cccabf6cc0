"""Loads exported folders with torch and transformers only, as a user would, and saves their results.

    python load_export.py TOKENS RESULTS FOLDER...

TOKENS and RESULTS are files of torch. Folders with a modeling file are trusted.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 16


def load(auto: Any, folder: str) -> Any:
    """The model in `folder`, in the type that it was written in."""
    return auto.from_pretrained(folder, trust_remote_code=any(Path(folder).glob("*.py")), dtype="auto")


def greedy(model: Any, tokens: torch.Tensor, cache: str | None = None) -> torch.Tensor:
    """Generate greedily after the first window, with the default or another kind of cache."""
    options = {} if cache is None else {"cache_implementation": cache}
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    mask = torch.ones_like(tokens[:1])
    generated: torch.Tensor = model.generate(tokens[:1], attention_mask=mask, do_sample=False, **length, **options)
    return generated


def results_of(folder: str, tokens: torch.Tensor) -> dict[str, Any]:
    """Return everything that the tests check for one folder."""
    model = load(AutoModelForCausalLM, folder)
    results = {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "parameters": sum(p.numel() for p in model.parameters()),
        "logits": model(input_ids=tokens).logits,
        "dynamic": greedy(model, tokens),
        "static": greedy(model, tokens, "static"),
        "hidden": load(AutoModel, folder)(input_ids=tokens).last_hidden_state,
    }
    if Path(folder, "tokenizer_config.json").exists():
        results["text"] = AutoTokenizer.from_pretrained(folder).decode(results["dynamic"][0])
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        results["again"] = load(AutoModelForCausalLM, again)(input_ids=tokens).logits
        results["hidden again"] = load(AutoModel, again)(input_ids=tokens).last_hidden_state
    model.set_attn_implementation("eager")
    results["implementations"] = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    results["eager"] = model(input_ids=tokens).logits
    return results


def is_refused_without_trust(folder: str) -> bool:
    """Whether transformers requires trust_remote_code for the folder."""
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        return "trust_remote_code" in str(error)
    return False


def main() -> None:
    """Load every folder and save the results by folder."""
    tokens_file, results_file, *folders = sys.argv[1:]
    transformers.utils.logging.disable_progress_bar()
    tokens = torch.load(tokens_file)
    with torch.inference_mode():
        results = {folder: {"refused": is_refused_without_trust(folder)} for folder in folders}
        for folder in folders:
            results[folder] |= results_of(folder, tokens)
    torch.save(results, results_file)


if __name__ == "__main__":
    main()
