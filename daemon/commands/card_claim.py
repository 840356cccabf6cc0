"""The perplexity on an exported folder's model card, so that `selfpruner evaluate DIR` can re-measure it."""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from daemon.commands.flags import TextFlags
from daemon.settings.target import check_text, text_spec
from protocol.errors import DataError, ModelError, SettingsError
from protocol.plans.spec import NAMED_TEXTS, Dtype, Role, SearchSpec, TextSpec, number_texts
from protocol.results.formats import FACTS, SAVED_TEXT, only_for_llama_cpp
from protocol.runtime.paths import expanded


class _Perplexity(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    perplexity: PositiveFloat


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore")

    spec: SearchSpec
    text_numbers: dict[Role, int] | None = None
    pruned: _Perplexity | None
    fitness_digest: str | None
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardClaim:
    """The perplexity that a model card states, and the texts that it was measured on."""

    texts: dict[Role, TextSpec]
    seed: int
    dtype: Dtype
    perplexity: float | None = None
    fitness_digest: str | None = None
    saved_text: Path | None = None
    """The file with the tokens, if the dense model generated them."""

    def changed(self, dtype: Dtype | None, seed: int | None) -> "CardClaim":
        """Return the claim with another dtype or seed, if given. Another dtype drops the perplexity.

        Raises SettingsError for a seed if the folder contains the tokens.
        """
        if seed is not None and self.saved_text is not None:
            raise SettingsError("--seed has no effect here: the folder contains the tokens that it was measured on")
        same = dtype in (None, self.dtype)
        return replace(
            self,
            dtype=dtype or self.dtype,
            seed=self.seed if seed is None else seed,
            perplexity=self.perplexity if same else None,
        )

    def about(self, digest: str) -> float | None:
        """Return the stated perplexity if it was measured on tokens with this digest, else None."""
        return self.perplexity if digest == self.fitness_digest else None


def card_claim(folder: str, flags: TextFlags) -> CardClaim | None:
    """Return the claim of an exported folder; None for other models, or if `flags` choose texts beyond `data`.

    The folder stores only file names: `flags.data` is the path of the text, which is otherwise looked up by its name.
    Raises ModelError for a folder with nothing but a GGUF file, and DataError if the text is not available.
    """
    path = Path(folder) / FACTS
    facts = _facts(path)
    if facts is not None and facts.formats == ("gguf",):
        raise ModelError(only_for_llama_cpp(folder))
    if flags != TextFlags(data=flags.data) or not path.is_file():
        return None
    if facts is None:
        if flags.data is not None:
            return None
        raise DataError(f"{path} does not say what {folder!r} was measured on: pass a text with --data")
    spec = facts.spec
    claimed = None if facts.pruned is None else facts.pruned.perplexity
    if flags.data is None and spec.fitness.source == "self":
        kept = Path(folder) / SAVED_TEXT
        if not kept.is_file():
            raise DataError(f"{folder!r} was measured on text that the dense model generated: give --data, a text file")
        return CardClaim({"fitness": spec.fitness}, spec.seed, spec.dtype, claimed, facts.fitness_digest, kept)
    # A text of its own takes no windows from the measured one. Older folders do not tell files of one name apart.
    numbers = facts.text_numbers or number_texts({role: text.source for role, text in spec.texts.items()})
    roles = {role: text for role, text in spec.texts.items() if numbers.get(role) == numbers.get("fitness")}
    name = spec.fitness.source
    if flags.data is None and name not in NAMED_TEXTS and not expanded(name).is_file():
        raise DataError(f"{folder!r} was measured on a file {name!r}, which was not found; pass its path with --data")
    texts = {role: _found(text, flags.data) for role, text in roles.items()}
    return CardClaim(texts, spec.seed, spec.dtype, claimed, facts.fitness_digest)


def _facts(path: Path) -> _Facts | None:
    try:
        return _Facts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _found(text: TextSpec, file: str | None) -> TextSpec:
    source = file or text.source
    if source not in NAMED_TEXTS:
        check_text(source)
    return text_spec(source, text.windows, text.seqlen)
