"""Finds llama.cpp's name for a tokenizer's pre-tokenizer, which a tokenizer.json gives as regular expressions.

A name stands for the expressions and for `ignore_merges` (whether a word that is a token is taken before any merge). A
wrong name would split some texts differently than in training and silently degrade the model, so a structure that is
not in the table is an error.
"""

from collections.abc import Iterator
from typing import Any

from protocol.errors import ModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's name by the splits, in order, and `ignore_merges`.

llama.cpp implements all of these pre-tokenizers. There is one difference: its `tekken` excludes combining marks
(Devanagari vowels) from words.
"""


def byte_level_name(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for a byte-level tokenizer.json's pre-tokenizer. Raises ModelError if it is unknown."""
    key = (tuple(_splits(parts["pre_tokenizer"])), bool(parts["model"].get("ignore_merges")))
    if key not in NAMES or _kind(parts["decoder"]) != "ByteLevel" or _kind(parts["normalizer"]) not in (None, "NFC"):
        raise ModelError(
            f"the format gguf does not support this tokenizer (splits {key[0]}, ignore_merges {key[1]}); "
            f"it supports those that llama.cpp calls {', '.join(NAMES.values())}"
        )
    return NAMES[key]


def _splits(part: dict[str, Any] | None) -> Iterator[str]:
    """Yield the regular expressions that split a text, in order; for other structures, their type."""
    match part:
        case {"type": "Sequence", "pretokenizers": steps}:
            for step in steps:
                yield from _splits(step)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield pattern
        case {"type": "Digits", "individual_digits": True}:
            yield _DIGIT
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(own)}:
            yield from (_GPT2,) if own else ()
        case _:
            yield f"<{_kind(part)}>"


def _kind(part: dict[str, Any] | None) -> str | None:
    return None if part is None else part["type"]


def prefixes_a_space(parts: dict[str, Any]) -> bool:
    """Return whether a SentencePiece-like tokenizer.json puts a space before a text. Raises ModelError if unsupported.

    With the scheme `first`, a tokenizer puts a space only before the first word; llama.cpp also puts a space after each
    special token.
    """
    steps = _steps(parts["normalizer"], "normalizers")
    match (steps, parts["pre_tokenizer"]):
        case ([{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], None):
            return False
        case ([{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}}], None):
            return True
        case ([], {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}):
            return bool(scheme != "never")
    raise ModelError(
        "the format gguf does not support this tokenizer: it has byte fallback like SentencePiece, but does not treat "
        f"spaces like it (normalizer {parts['normalizer']}, pre-tokenizer {parts['pre_tokenizer']})"
    )


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]
