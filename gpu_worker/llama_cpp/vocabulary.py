"""The vocabulary of a GGUF file, read from a transformers tokenizer.

Two kinds of tokenizer are known, both byte-pair encodings. Byte-level ones (Llama 3, SmolLM2) are written with their
merges and the name by which llama.cpp calls their pre-tokenizer. SentencePiece ones (Llama 1 and 2, Vicuna, Mistral)
are written with scores; the tokenizer has only merges any more, but their order is the order of the scores.
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
"""Score of tokens that no merge makes."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokens; `tokens`, `types` and `scores` have one entry per row of the embedding."""

    model: Literal["gpt2", "llama"]
    pre_tokenizer: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: tuple[tuple[str, int], ...] = ()
    """Ids of `bos`, `eos`, `unk` and `pad`, of those that there are."""
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False
    """Whether a space is put before the text."""
    chat_template: str | list[dict[str, str]] | None = None

    def add_to(self, writer: Any) -> None:
        """Write it as metadata with this GGUFWriter."""
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
    """The vocabulary of a transformers tokenizer for a model with this config.

    Rows of the embedding without a token become unused tokens `[PAD<id>]`. Raises ModelError for a tokenizer that
    llama.cpp would read differently, and where the tokenizer has more tokens than the embedding has rows.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError("the format gguf needs the model's tokenizer, of the kind that has a tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise ModelError(f"the format gguf supports BPE tokenizers, and this model's is {parts['model']['type']}")
    tokens, types = _tokens(tokenizer, parts, config.vocab_size)
    common: dict[str, Any] = {"tokens": tokens, "types": types, "special": _special(tokenizer, config)}
    common |= dict(zip(("adds_bos", "adds_eos"), _added_around(tokenizer), strict=True))
    common["chat_template"] = _chat_template(tokenizer.chat_template)
    merges = _merges(parts)
    if parts["model"].get("byte_fallback"):
        space = prefixes_a_space(parts)
        return Vocabulary("llama", "default", scores=_scores(tokens, merges), adds_space=space, **common)
    # llama.cpp insists on merges and the writer leaves out an empty list: without any there is one of nothing.
    joined = tuple(" ".join(pair) for pair in merges) or ("",)
    return Vocabulary("gpt2", byte_level_name(parts), merges=joined, **common)


def _tokens(tokenizer: Any, parts: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and types of tokens 0 … rows − 1."""
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
    """Pairs in their order; older files hold each as one text with a space between."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in parts["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _scores(tokens: tuple[str, ...], merges: list[tuple[str, str]]) -> tuple[float, ...]:
    """Minus the place of the first merge that makes a token: llama.cpp joins the pair of the highest score first."""
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, place)
    return tuple(-float(places[token]) if token in places else _NEVER for token in tokens)


def _special(tokenizer: Any, config: Any) -> tuple[tuple[str, int], ...]:
    """Ids of the special tokens. Raises ModelError without an end: llama.cpp would take token 11 or 2 for it."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None:
        end = config.eos_token_id
        ids["eos"] = end[0] if isinstance(end, list) else end
    if ids["eos"] is None:
        raise ModelError("the format gguf needs a tokenizer with an end-of-text token (eos_token)")
    return tuple((name, number) for name, number in ids.items() if number is not None)


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos and eos around a text: found by trying, for files say it in several ways."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise ModelError(f"the tokenizer puts other tokens around a text than bos and eos, which gguf cannot say: {whole}")


def _chat_template(template: str | dict[str, str] | None) -> str | list[dict[str, str]] | None:
    """One template as it is; several, by name, as the writer wants them."""
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
