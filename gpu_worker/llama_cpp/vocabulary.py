"""Converts a transformers tokenizer to the vocabulary of a GGUF file.

Two kinds of byte-pair encoding are supported. Byte-level tokenizers (Llama 3, SmolLM2) are written with their merges
and llama.cpp's name for their pre-tokenizer. SentencePiece tokenizers (Llama 1 and 2, Vicuna, Mistral) are written with
scores, which follow from the order of the tokenizer's merges.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from gguf import TokenType

from gpu_worker.llama_cpp.pre_tokenizers import byte_level_name, prefixes_a_space
from protocol.errors import ModelError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NEVER = -1e6
"""Score of tokens that no merge produces."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file; `tokens`, `types` and `scores` have one entry per row of the embedding."""

    model: Literal["gpt2", "llama"]
    pre_tokenizer: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: tuple[tuple[str, int], ...] = ()
    """Ids of `bos`, `eos`, `unk` and `pad`, if they exist."""
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False
    """Whether a space is added before the text."""
    chat_template: str | list[dict[str, str]] | None = None

    def add_to(self, writer: Any) -> None:
        """Write the vocabulary as metadata with a GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)
        for name, number in self.special:
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        writer.add_add_space_prefix(self.adds_space)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, config: Any) -> Vocabulary:
    """Read the vocabulary of a transformers tokenizer for a model with this config.

    Embedding rows without a token become unused tokens `[PAD<id>]`. Raises ModelError for a tokenizer that llama.cpp
    would read differently, and for more tokens than embedding rows.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError("the format gguf needs a tokenizer with a tokenizer.json, which this model does not have")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise ModelError(f"the format gguf supports BPE tokenizers, but this model's is {parts['model']['type']}")
    tokens, types = _tokens(tokenizer, parts, config.vocab_size)
    common: dict[str, Any] = {"tokens": tokens, "types": types, "special": _special(tokenizer, config)}
    common |= dict(zip(("adds_bos", "adds_eos"), _added_around(tokenizer), strict=True))
    common["chat_template"] = _chat_template(tokenizer.chat_template)
    merges = _merges(parts)
    if parts["model"].get("byte_fallback"):
        space = prefixes_a_space(parts)
        return Vocabulary("llama", "default", scores=_scores(tokens, merges), adds_space=space, **common)
    # llama.cpp requires merges, and the writer omits an empty list. So a tokenizer without merges gets one empty merge.
    joined = tuple(" ".join(pair) for pair in merges) or ("",)
    return Vocabulary("gpt2", byte_level_name(parts), merges=joined, **common)


def _tokens(tokenizer: Any, parts: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return texts and types of tokens 0 … rows − 1."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= rows:
        raise ModelError(f"the tokenizer has token {max(texts)} where the model's embedding has {rows} rows")
    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    byte_fallback = bool(parts["model"].get("byte_fallback"))
    unknown = parts["model"].get("unk_token")

    def kind(number: int) -> TokenType:
        text = texts.get(number)
        if text is None:
            return TokenType.UNUSED
        if byte_fallback and text == unknown:
            return TokenType.UNKNOWN
        if number in added:
            return TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
        return TokenType.BYTE if byte_fallback and _BYTE.fullmatch(text) else TokenType.NORMAL

    return (
        tuple(texts.get(number, f"[PAD{number}]") for number in range(rows)),
        tuple(int(kind(number)) for number in range(rows)),
    )


def _merges(parts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges as pairs, in order; older files store each merge as one string with a space."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in parts["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _scores(tokens: tuple[str, ...], merges: list[tuple[str, str]]) -> tuple[float, ...]:
    """Return minus the rank of the first merge that produces each token: llama.cpp merges the highest score first."""
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, place)
    return tuple(-float(places[token]) if token in places else _NEVER for token in tokens)


def _special(tokenizer: Any, config: Any) -> tuple[tuple[str, int], ...]:
    """Return ids of special tokens. Raises ModelError if eos is missing, because llama.cpp would use token 11 or 2."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None:
        end = config.eos_token_id
        ids["eos"] = end[0] if isinstance(end, list) else end
    if ids["eos"] is None:
        raise ModelError("the format gguf needs a tokenizer with an end-of-text token (eos_token)")
    return tuple((name, number) for name, number in ids.items() if number is not None)


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer adds bos and eos. It is tried out, because files state it in several ways."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise ModelError(f"the format gguf supports only bos and eos around a text, but this tokenizer gives {whole}")


def _chat_template(template: str | dict[str, str] | None) -> str | list[dict[str, str]] | None:
    """Return a single template unchanged, and several named templates in the writer's format."""
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
