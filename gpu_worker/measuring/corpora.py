"""Reads texts as fixed-length windows of tokens for calibration, fitness and the report."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_worker.cache import remembered
from gpu_worker.measuring.examples import Example, read_examples, tokenized
from gpu_worker.measuring.windows import given
from gpu_worker.models.checkpoints import reading, reason
from gpu_worker.models.hub import hub_reachable, set_datasets_offline
from protocol.errors import DataError
from protocol.plans.spec import Role, TextSpec, is_examples, windows_in_words

WIKITEXT2 = "wikitext2"
C4 = "c4"
SELF = "self"
SPLITS: dict[str, dict[Role, str]] = {
    # Calibrates on the train split, because 128 windows of 4,096 tokens exceed the validation split. FLAP's code
    # calibrates Wanda-sp on C4; when it reads this split, it joins the rows by spaces.
    WIKITEXT2: {"calibration": "train", "fitness": "validation", "report": "test"},
    # SparseGPT reports on the first 1,100 documents of the validation file.
    C4: {"calibration": "train[:4000]", "fitness": "validation[1100:2200]", "report": "validation[:1100]"},
}
"""The split of a hub dataset that each role reads."""
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
"""One file of each split of C4, which has 300 GB in total."""

MIN_CHARACTERS_IN_CACHE = 300_000
"""Texts from this length on are worth keeping as tokens: a megabyte takes a second or two to tokenise."""

Source = tuple[str, str]
"""A text and its split, if it has several. Roles with the same source divide its windows among themselves."""
GenerateText = Callable[[int, int], Tensor]
"""(number of windows, length) -> tokens [windows, length] written by the dense model."""


@dataclass(frozen=True)
class Texts:
    """Windows of tokens (long, [windows, seqlen], on the CPU); disjoint when roles share a source."""

    calibration: Tensor
    fitness: Tensor
    report: Tensor | None

    @classmethod
    def of(cls, windows: Mapping[Role, Tensor]) -> "Texts":
        """Return the windows of `load_roles`, which must be those of calibration and fitness at least."""
        return cls(windows["calibration"], windows["fitness"], windows.get("report"))

    @property
    def digest(self) -> str:
        """Return the SHA-256 of all windows: equal on workers that measure on the same tokens."""
        return windows_digest(*(w for w in (self.calibration, self.fitness, self.report) if w is not None))


def windows_digest(*texts: Tensor) -> str:
    """Return the SHA-256 of tokens [windows, seqlen]."""
    digest = hashlib.sha256()
    for windows in texts:
        digest.update(f"{tuple(windows.shape)}".encode())
        digest.update(windows.numpy().tobytes())
    return digest.hexdigest()


def load_roles(
    texts: Mapping[Role, TextSpec],
    seed: int,
    tokenizer: Any,
    generate: GenerateText,
    start: int | None = None,
    only: Collection[Role] | None = None,
) -> dict[Role, Tensor]:
    """Return the windows of each role of `texts`. `generate` is called for the source `self`.

    A source is cut into chunks that are as long as the longest window of its roles. The roles (calibration, fitness,
    report, in this order) take chunks from one seeded shuffle and cut them to their own length. A role that asks for
    all windows gets the chunks that the other roles left, in text order. Raises DataError for a source that is not
    available or too short.

    With `only`, the windows of all other roles are only reserved, and a source that only these roles use is not read.
    `start` replaces the first token of every window, which is context and never predicted. Some models predict badly
    without the token that started every text in training.

    A file of examples (see measuring/examples.py) gives one window per example, of which only the answer is predicted
    (see measuring/windows.py). For calibration, its examples are joined and cut like a text.
    """
    by_source: dict[Source, dict[Role, TextSpec]] = defaultdict(dict)
    for role, text in texts.items():
        by_source[source_of(role, text)][role] = text
    windows: dict[Role, Tensor] = {}
    for source, roles in by_source.items():
        if only is not None and roles.keys().isdisjoint(only):
            continue
        if is_examples(source[0]):
            shortest = min(text.seqlen for text in roles.values())
            windows |= windows_of_examples(_examples(source[0], tokenizer, start, shortest), roles, seed, source[0])
            continue
        length = max(text.seqlen for text in roles.values())
        tokens = _self_tokens(roles, length, generate) if source[0] == SELF else _tokens(source, tokenizer)
        windows |= split_by_role(tokens, roles, length, seed, source[0])
    if start is not None:
        for role, tokens in windows.items():
            if role == "calibration" or not is_examples(texts[role].source):
                tokens[:, 0] = start
    return windows


def windows_of_examples(
    examples: Sequence[Example], roles: dict[Role, TextSpec], seed: int, name: str
) -> dict[Role, Tensor]:
    """Distribute examples among roles by a seeded shuffle; a role that asks for all windows gets those left.

    Calibration gets as many as fill its windows, all others one window per example. Raises DataError if there are too
    few.
    """
    shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    windows: dict[Role, Tensor] = {}
    for role, text in sorted(roles.items(), key=lambda each: each[1].windows is None):
        taken: list[int] = []
        if role == "calibration":
            wanted, tokens = (text.windows or len(examples)) * text.seqlen, 0
            while shuffled and tokens < wanted:
                taken.append(shuffled.pop(0))
                tokens += len(examples[taken[-1]].tokens)
            enough = text.windows is None or tokens >= wanted
        else:
            count = len(shuffled) if text.windows is None else text.windows
            taken, shuffled = shuffled[:count], shuffled[count:]
            enough = bool(taken) and (text.windows is None or len(taken) == count)
        if not enough:
            asked = windows_in_words(roles)
            raise DataError(f"{name!r} is too short: its {len(examples):,} examples are too few {asked}")
        chosen = [examples[i] for i in (sorted(taken) if text.windows is None else taken)]
        windows[role] = _joined(chosen, text.seqlen) if role == "calibration" else _filled(chosen, text.seqlen)
    return windows


def _joined(examples: Sequence[Example], seqlen: int) -> Tensor:
    tokens = torch.cat([example.tokens for example in examples])
    return cut(tokens[None], seqlen)


def _filled(examples: Sequence[Example], seqlen: int) -> Tensor:
    """Return a window [seqlen] for each example: the given prompt, the answer, and given tokens to fill it up."""
    windows = given(torch.zeros(len(examples), seqlen, dtype=torch.long))
    for window, example in zip(windows, examples, strict=True):
        window[: example.first] = given(example.tokens[: example.first])
        window[example.first : len(example.tokens)] = example.tokens[example.first :]
    return windows


def _examples(path: str, tokenizer: Any, start: int | None, seqlen: int) -> list[Example]:
    kept = tokenized(read_examples(Path(path)), tokenizer, start, seqlen)
    if not kept:
        raise DataError(f"no answer of {path!r} starts within {seqlen} tokens: increase seqlen")
    return kept


def split_by_role(tokens: Tensor, roles: dict[Role, TextSpec], length: int, seed: int, name: str) -> dict[Role, Tensor]:
    """Distribute the chunks of `length` tokens of one text [tokens] among its roles; see `load_roles`."""
    chunks = tokens[: len(tokens) // length * length].view(-1, length)
    shuffled = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))
    windows: dict[Role, Tensor] = {}
    taken = 0
    for role, text in roles.items():
        if text.windows is not None:
            count = chunks_needed(text, length)
            if taken + count > len(chunks):
                raise DataError(_too_short(name, len(tokens), roles))
            windows[role] = cut(chunks[shuffled[taken : taken + count]], text.seqlen)[: text.windows]
            taken += count
    for role, text in roles.items():
        if text.windows is None:
            if taken == len(chunks):
                raise DataError(_too_short(name, len(tokens), roles))
            windows[role] = cut(chunks[shuffled[taken:].sort().values], text.seqlen)
            taken = len(chunks)
    return windows


def cut(chunks: Tensor, seqlen: int) -> Tensor:
    """Cut chunks [n, length] into windows [n × (length // seqlen), seqlen]."""
    per_chunk = chunks.shape[1] // seqlen
    return chunks[:, : per_chunk * seqlen].reshape(-1, seqlen)


def chunks_needed(text: TextSpec, length: int) -> int:
    """Return how many chunks of `length` hold the windows of `text`."""
    assert text.windows is not None
    return -(-text.windows // (length // text.seqlen))


def source_of(role: Role, text: TextSpec) -> Source:
    """Return the source of a role's windows."""
    return text.place, SPLITS[text.source][role] if text.source in SPLITS else ""


def _tokens(source: Source, tokenizer: Any) -> Tensor:
    text = _of_the_hub(*source) if source[0] in SPLITS else _file(source[0])
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def tokenized() -> Tensor:
        # Word-level WikiText replaces rare words with `<unk>`, which some tokenizers read as a special token.
        ids = tokenizer(text.replace("<unk>", "unk"), verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    if backend is None or len(text) < MIN_CHARACTERS_IN_CACHE:
        return tokenized()
    key = {
        "text": _digest(text),
        "tokenizer": _digest(backend.to_str()),
        "settings": repr(getattr(tokenizer, "split_special_tokens", None)),
        "libraries": [version("tokenizers"), version("transformers")],
    }
    return remembered("tokens", key, tokenized, about=source[0], write=save_tokens, read=load_tokens)


def save_tokens(tokens: Tensor, folder: Path) -> None:
    """Write tokens into the folder of an entry of the cache."""
    save_file({"tokens": tokens.contiguous()}, folder / "tokens.safetensors")


def load_tokens(folder: Path) -> Tensor:
    """Read what `save_tokens` wrote."""
    return load_file(folder / "tokens.safetensors")["tokens"].clone()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _self_tokens(roles: dict[Role, TextSpec], length: int, generate: GenerateText) -> Tensor:
    if any(text.windows is None for text in roles.values()):
        raise DataError(f"the source `{SELF}` is unlimited: set the number of windows")
    return generate(sum(chunks_needed(text, length) for text in roles.values()), length).flatten()


def _file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"the text {path!r} cannot be read ({error.strerror}); pass a text file, `{WIKITEXT2}`, `{C4}` or `{SELF}`"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"the text {path!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error


@dataclass(frozen=True)
class HubData:
    """A dataset on the hub."""

    repository: str
    config: str | None
    called: str
    """The dataset's name in messages."""
    otherwise: str
    """Advice in messages about a dataset that is not available."""

    def split(self, split: str, data_files: Mapping[str, str] | None = None) -> Any:
        """Load a split; with `data_files`, load the files that it names for the split.

        Raises DataError if the dataset is not available.
        """
        import datasets  # takes half a second, needed only for data from the hub

        datasets.disable_progress_bars()
        offline = not hub_reachable()
        if offline:
            set_datasets_offline()
        with reading(partial(self._cannot_load, offline), DataError):
            return datasets.load_dataset(self.repository, self.config, split=split, data_files=data_files)

    def _cannot_load(self, offline: bool, error: Exception) -> str:
        # A DatasetGenerationError only says that another error occurred, which is its cause.
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        true = cause if isinstance(cause, Exception) else error
        if offline and isinstance(true, ConnectionError | FileNotFoundError | ValueError):
            return f"{self.called} is not on this machine and the hub cannot be reached; {self.otherwise}"
        return f"{self.called} cannot be loaded ({reason(true)}); {self.otherwise}"


def _of_the_hub(name: str, split: str) -> str:
    otherwise = f"pass a text file, or `{SELF}`"
    if name == C4:
        kind = split.partition("[")[0]
        # No config is named, because `datasets` would report the config's other files as missing.
        documents = HubData("allenai/c4", None, name, otherwise).split(split, {kind: C4_FILES[kind]})
        return " ".join(documents["text"])  # as SparseGPT joins them
    wikitext = HubData("Salesforce/wikitext", "wikitext-2-raw-v1", name, otherwise)
    return "\n\n".join(wikitext.split(split)["text"])


def _too_short(name: str, tokens: int, roles: dict[Role, TextSpec]) -> str:
    longest = max(text.seqlen for text in roles.values())
    has = f"its {tokens:,} tokens make only {tokens // longest} windows of {longest}"
    return f"the text {name!r} is too short: {has} {windows_in_words(roles)}"
