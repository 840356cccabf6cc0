"""Text that the dense model writes, for calibration and fitness if no corpus is available.

It is sampled once, shared by all workers of a search, and saved in an export that was measured on it.
"""

import json
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy
import structlog
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from gpu_worker.cache import remembered
from gpu_worker.measuring.corpora import load_tokens, save_tokens
from gpu_worker.measuring.smollm2_text import written_beforehand
from gpu_worker.models.loading import LoadedModel
from gpu_worker.models.memory import generation_batch_size
from gpu_worker.progress import Progress
from protocol.errors import DataError, StoreError
from protocol.plans.spec import TextSpec
from protocol.queue.self_text import SelfText
from protocol.results.formats import SAVED_TEXT
from protocol.runtime.paths import SMOLLM2

TEMPERATURE = 1.0
TOP_K = 50
"""Number of most probable tokens to sample from. Without a limit, a small model soon derails on unlikely tokens."""
OPENINGS = (
    "The history of", "In the early", "A new study", "She was born in", "The first", "During the war", "According to",
    "The city of", "Scientists have", "It was", "The film", "In mathematics", "The river", "He began his career",
    "The company", "Most people", "The song", "When the", "Many species of", "The government", "An important",
    "The team", "On the morning of", "The main character",
)  # fmt: skip
"""Prompts that the windows begin with, in turn. From a bare start token, an instruction-tuned model would write chat
markup."""
Offer = Callable[[str], str]
"""JSON of the text that this worker wrote -> JSON of the published text."""

log = structlog.get_logger()


def self_text(model: LoadedModel, windows: int, length: int, seed: int, progress: Progress) -> Tensor:
    """Return tokens (long, [windows, length]) sampled from the dense model.

    They are read if they are kept, or if the model is `smollm2`, whose text lies in this package.
    """
    if model.name == SMOLLM2 and (text := written_beforehand(windows, length, seed)) is not None:
        return text
    key = {
        "weights": model.identity,
        "dtype": str(model.causal_lm.dtype),
        "device": model.device.type,
        "seed": seed,
        "windows": windows,
        "length": length,
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
    }
    return remembered(
        "self-text",
        key,
        lambda: sample(model, windows, length, seed, progress),
        about=model.name,
        write=save_tokens,
        read=load_tokens,
    )


def share_text(published: str | None, offer: Offer, windows: int, length: int, write: Callable[[], Tensor]) -> Tensor:
    """Return the tokens (long, [windows, length]) that all workers of a search use: the first published text.

    `published` is the JSON of that text. If it is None, call `write`, `offer` the result, and return the text that is
    published then. A text that is too long to publish is used by this worker alone. Raises StoreError if the published
    text has another version or size.
    """
    if published is not None:
        return _tokens(published, windows, length)
    written = write()
    packed = SelfText.pack(windows, length, written.numpy().astype("<i4").tobytes())
    if packed is None:
        log.warning("self_text_too_long_to_share", windows=windows, length=length)
        return written
    return _tokens(offer(packed.model_dump_json()), windows, length)


def _tokens(published: str, windows: int, length: int) -> Tensor:
    try:
        text = SelfText.model_validate_json(published)
    except ValidationError as error:
        raise StoreError("the published text of the model was written by another version") from error
    if (text.windows, text.length) != (windows, length):
        raise StoreError(
            f"the published text of the model has {text.windows} windows of {text.length} tokens, "
            f"where {windows} of {length} are needed"
        )
    tokens = numpy.frombuffer(text.unpack(), dtype="<i4").astype(numpy.int64)
    return torch.from_numpy(tokens).view(windows, length)


def save_text(windows: Tensor, folder: Path) -> None:
    """Write the tokens (long, [n, seqlen]) that an export was measured on into its folder.

    The pruned model cannot write the same text again. The file is JSON because model loaders read every safetensors
    file in a folder as weights.
    """
    (folder / SAVED_TEXT).write_text(json.dumps({"tokens": windows.tolist()}, separators=(",", ":")), encoding="utf-8")


def load_saved_text(file: Path, text: TextSpec, vocabulary: int) -> Tensor:
    """Return the tokens (long, [n, seqlen]) that `save_text` wrote. Raises DataError if they do not match `text`."""
    try:
        tokens = torch.tensor(json.loads(file.read_text(encoding="utf-8"))["tokens"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise DataError(f"{file} does not hold the text that was measured ({error}): give --data") from error
    is_expected = tokens.dtype == torch.long and tuple(tokens.shape) == (text.windows, text.seqlen)
    if not is_expected or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise DataError(f"{file} does not match the text that the folder says was measured: give --data")
    return tokens


def sample(model: LoadedModel, windows: int, length: int, seed: int, progress: Progress) -> Tensor:
    """Sample `windows` texts of `length` tokens at temperature 1 from the top 50 tokens, without special tokens."""
    prompts = _prompts(model.tokenizer, length)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    batches = []
    progress("writing text", 0, windows * length)
    together = generation_batch_size(model.decoder.shape, model.causal_lm.dtype.itemsize, length)
    for start in range(0, windows, together):
        rows = torch.arange(start, min(start + together, windows)) % len(prompts)
        report = partial(_report, progress, start * length, len(rows), windows * length)
        batches.append(_continue(model, prompts[rows].to(model.device), length, generator, report))
    return torch.cat(batches).cpu()


def _report(progress: Progress, before: int, texts: int, total: int, length: int) -> None:
    """Report progress: `texts` have reached `length` tokens each, after `before` tokens of earlier batches."""
    progress("writing text", before + texts * length, total)


def _prompts(tokenizer: Any, length: int) -> Tensor:
    """Return the openings as tokens, all cut to the length of the shortest, so that no padding is needed."""
    ids = [tokenizer(text)["input_ids"] for text in OPENINGS]
    shortest = min(length - 1, *(len(row) for row in ids))
    return torch.tensor([row[:shortest] for row in ids], dtype=torch.long)


def _continue(
    model: LoadedModel, prompts: Tensor, length: int, generator: torch.Generator, report: Callable[[int], None]
) -> Tensor:
    """Continue `prompts` [batch, prompt] to [batch, length]; call `report` with the length so far.

    transformers' `generate` takes twice as long, because it samples from the whole vocabulary and copies its cache for
    each token.
    """
    decoder = model.decoder
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.long, device=prompts.device)
    cache = DynamicCache()
    cache.layers = [_ReservedLayer(length) for _ in decoder.layers]
    argument = "cache" if "cache" in signature(type(decoder.body).forward).parameters else "past_key_values"
    tokens = prompts
    newest = prompts
    with torch.inference_mode():
        for position in range(prompts.shape[1], length):
            hidden = decoder.body(input_ids=newest, use_cache=True, **{argument: cache}).last_hidden_state
            logits = decoder.head(hidden[:, -1]).float()
            newest = _draw(logits.to(prompts.device), special, generator)  # the head may be on another GPU
            tokens = torch.cat([tokens, newest], dim=1)
            report(position + 1)
    return tokens


def _draw(logits: Tensor, special: Tensor, generator: torch.Generator) -> Tensor:
    """Sample a token [batch, 1] for each row of `logits` [batch, vocabulary], excluding special tokens.

    A special token would end the text or start a new document in the window.
    """
    logits[:, special] = -torch.inf
    likeliest, ids = logits.topk(min(TOP_K, logits.shape[1] - len(special)))
    chosen = torch.multinomial(torch.softmax(likeliest / TEMPERATURE, dim=-1), 1, generator=generator)
    return ids.gather(1, chosen)


class _ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's KV cache, preallocated for all tokens; the base class copies the cache for each token."""

    # Makes transformers pass an attention mask. With a mask, transformers groups the query heads that share a KV head.
    # Without a mask, it leaves this to torch, whose CPU kernel is five times slower for a single token.
    is_compileable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the new states [batch, KV heads, tokens, head dim] and return all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = (self._reserve(states) for states in (key_states, value_states))
        end = self._filled + key_states.shape[-2]
        self._keys[:, :, self._filled : end] = key_states
        self._values[:, :, self._filled : end] = value_states
        self._filled = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def _reserve(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self._capacity, width)
