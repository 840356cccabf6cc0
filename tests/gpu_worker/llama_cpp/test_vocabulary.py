"""The vocabulary of a GGUF file: llama.cpp splits texts into the tokens that the model was trained on."""

import dataclasses
import json
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gpu_worker.llama_cpp.pre_tokenizers import NAMES
from gpu_worker.llama_cpp.writer import check_gguf, write_gguf
from gpu_worker.models.loading import LoadedModel, load_model
from protocol.errors import ModelError
from protocol.plans.plan import dense_plan
from tests.support.real_model import need_smollm2
from tests.support.root import ROOT
from tests.support.tiny_models import byte_tokenizer, tiny_model

pytest.importorskip("xllamacpp")

from tests.support import llama_cpp

ROWS = 800
"""Rows of the embedding: more than any tokenizer here has tokens."""
CORPUS = (ROOT / "LICENSE").read_text().splitlines()
TEXTS = [
    "Hello world",
    " two  spaces,   three, and a tab\there",
    "lines\n\nand\r\nmore  \n   lines\n",
    "It's we'll I'VE don't SHOULDN'T",
    "in 1987 there were 1234567 of 3.14159 and ½ or ²",
    "def f(x):\n    return x**2  # comment!?",
    "Grüße, Ελλάδα, Привет, こんにちは世界, 안녕 हिन्दी",
    "👩‍🚀🎉 naïve café e\u0301",
    "CamelCaseWORDS and snake_case/paths\\here",
    "the licence's LICENSE, distribution of derivative works",
    "…“quotes”—dash",
    "",
]
SPECIAL_TEXTS = ["<first>Hi there<last>\nNext", "a <tool> call", "<first><first> x"]
"""Texts with special and with added tokens in them."""


def llama3_like(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level_merges(ignore_merges: bool) -> Tokenizer:
    """Merges that go beyond words, so that every split shows, and some tokens that no merge makes."""
    trained = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<first>", "<last>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([*CORPUS, *TEXTS * 40], trainer)
    parts = json.loads(trained.to_str())
    del parts["model"]["merges"][20::9]
    return Tokenizer.from_str(json.dumps(parts))


def byte_level(name: str) -> Any:
    """A tokenizer with the pre-tokenizer that llama.cpp calls `name`."""
    ((splits, ignore_merges),) = [key for key, value in NAMES.items() if value == name]
    whole = byte_level_merges(ignore_merges)
    whole.pre_tokenizer = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }.get(name) or llama3_like(splits[0])
    whole.add_tokens([AddedToken("<tool>", normalized=False)])
    return wrapped(whole)


def sentencepiece_like(*, legacy: bool, bos: bool = True) -> Any:
    """A tokenizer as transformers has it for Llama 1 and 2: byte fallback, ▁ for spaces, words not split."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<first>", "<last>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    # As special tokens, the byte tokens would be found in texts.
    parts = json.loads(trained.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]
    whole = Tokenizer.from_str(json.dumps(parts))
    whole.add_tokens([AddedToken("<tool>", normalized=False)])
    if legacy:
        whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        whole.pre_tokenizer = None
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        whole.post_processor = processors.TemplateProcessing(single="<first> $A", special_tokens=[("<first>", 1)])
    return wrapped(whole, unk_token="<unk>")


def wrapped(whole: Tokenizer, **options: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<first>", eos_token="<last>", **options
    )


def tiny(tokenizer: Any, **options: Any) -> LoadedModel:
    model = tiny_model("llama", layers=1, **({"vocab_size": ROWS} | options))
    return dataclasses.replace(model, tokenizer=tokenizer)


def export(tokenizer: Any, folder: Path, **options: Any) -> Path:
    """The file of a tiny model with this tokenizer."""
    model = tiny(tokenizer, **options)
    return write_gguf(model, dense_plan(model.decoder.shape), folder, file_type="f16", name="tiny")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes only": byte_tokenizer,
    **{name: partial(byte_level, name) for name in NAMES.values()},
    "sentencepiece, legacy": partial(sentencepiece_like, legacy=True),
    "sentencepiece, legacy, no bos": partial(sentencepiece_like, legacy=True, bos=False),
}


def has_marks(text: str) -> bool:
    return any(unicodedata.category(letter).startswith("M") for letter in text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_and_joins_texts_as_transformers_does(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    with llama_cpp.serving(export(tokenizer, tmp_path)) as server:
        for text in [*TEXTS, *SPECIAL_TEXTS]:
            if name == "tekken" and has_marks(text):
                continue  # llama.cpp's expression for tekken leaves combining marks out of words
            tokens = tokenizer(text)["input_ids"]
            assert server.tokenize(text) == tokens, text
            # Where no bos comes first, llama.cpp leaves the space that SentencePiece puts before a text.
            assert server.detokenize(tokens).lstrip(" ") == tokenizer.decode(tokens).lstrip(" ")


@pytest.mark.model
def test_llama_cpp_splits_texts_as_smollm2s_tokenizer_does(tmp_path: Path) -> None:
    need_smollm2()
    tokenizer = load_model("smollm2", "bfloat16").tokenizer
    with llama_cpp.serving(export(tokenizer, tmp_path, vocab_size=len(tokenizer))) as server:
        for text in [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]:
            assert server.tokenize(text) == tokenizer(text)["input_ids"], text


def test_newer_sentencepiece_tokenizers_differ_by_a_space_after_special_tokens_only(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(legacy=False)
    with llama_cpp.serving(export(tokenizer, tmp_path)) as server:
        for text in TEXTS:
            if not text.startswith(" "):
                assert server.tokenize(text) == tokenizer(text)["input_ids"], text
        space = tokenizer.convert_tokens_to_ids("▁")
        assert tokenizer("<last>Hi")["input_ids"] == [1, 2, *tokenizer.convert_tokens_to_ids(["H", "i"])]
        assert server.tokenize("<last>Hi") == [1, 2, space, *tokenizer.convert_tokens_to_ids(["H", "i"])]


def test_every_row_of_the_embedding_has_a_token_of_the_right_type(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(legacy=True)
    path = export(tokenizer, tmp_path)
    tokens = llama_cpp.read_field(path, "tokenizer.ggml.tokens")
    types = [TokenType(kind).name for kind in llama_cpp.read_field(path, "tokenizer.ggml.token_type")]
    assert len(tokens) == len(types) == ROWS
    size = len(tokenizer)
    assert tokens[:size] == tokenizer.convert_ids_to_tokens(list(range(size)))
    assert types[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert types[258:260] == ["BYTE", "NORMAL"]
    assert types[size - 1 : size + 1] == ["USER_DEFINED", "UNUSED"]
    assert tokens[-1] == f"[PAD{ROWS - 1}]" and types[-1] == "UNUSED"


def test_special_tokens_and_what_is_put_around_a_text_are_written(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(legacy=True)
    tokenizer.pad_token = "<tool>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <last>", special_tokens=[("<last>", 2)]
    )
    path = export(tokenizer, tmp_path)
    for key, expected in {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": False,
        "add_eos_token": True,
        "add_space_prefix": True,
        "model": "llama",
    }.items():
        assert llama_cpp.read_field(path, f"tokenizer.ggml.{key}") == expected, key


def test_without_an_end_in_the_tokenizer_the_configs_is_taken(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    path = export(tokenizer, tmp_path, eos_token_id=[7, 9])
    assert llama_cpp.read_field(path, "tokenizer.ggml.eos_token_id") == 7


@pytest.mark.parametrize("several", [False, True])
def test_the_chat_template_is_what_llama_cpp_chats_with(several: bool, tmp_path: Path) -> None:
    template = "{% for m in messages %}<first>{{ m.role }}: {{ m.content }}<last>{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": template, "other": "{{ 1 }}"} if several else template
    with llama_cpp.serving(export(tokenizer, tmp_path)) as server:
        answer = server.post("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})
    assert answer["prompt"] == "<first>user: Hi<last>"


def unigram() -> Any:
    return wrapped(Tokenizer(models.Unigram([("a", -1.0), ("<first>", -1.0), ("<last>", -1.0)], unk_id=0)))


def changed(tokenizer: Any, **of_backend: Any) -> Any:
    for name, value in of_backend.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


def unknown_frame() -> Any:
    ends = [("<last>", byte_tokenizer().eos_token_id)]
    frame = processors.TemplateProcessing(single="<last> $A", special_tokens=ends)
    return changed(byte_tokenizer(), post_processor=frame)


def endless() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def too_long() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<more {number}>" for number in range(ROWS)])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: None, "needs a tokenizer with a tokenizer.json"),
        (unigram, "supports BPE tokenizers, but this model's is Unigram"),
        (
            lambda: changed(byte_level("gpt-2"), pre_tokenizer=llama3_like(r"\w+")),
            "it supports those that llama.cpp calls gpt-2, smollm, llama-bpe",
        ),
        (
            lambda: changed(sentencepiece_like(legacy=True), pre_tokenizer=pre_tokenizers.Metaspace(split=True)),
            "does not treat spaces like it",
        ),
        (unknown_frame, "supports only bos and eos around a text"),
        (endless, "needs a tokenizer with an end-of-text token"),
        (too_long, f"the tokenizer has token 1057 where the model's embedding has {ROWS} rows"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    make: Callable[[], Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=sentence):
        check_gguf(tiny(make()))
    with pytest.raises(ModelError, match=sentence):
        export(make(), tmp_path)
    assert not list(tmp_path.iterdir())
