"""Settings of the target model and of the texts it is measured on."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from daemon.settings.packages import need
from daemon.settings.section import Section
from protocol.errors import DataError
from protocol.plans.rates import DECIMALS, TargetRate
from protocol.plans.size import Memory, Parameters, Size
from protocol.plans.spec import NAMED_TEXTS, Dtype, Role, TextSpec, is_examples, windows_in_words
from protocol.runtime.paths import expanded

MORE_TOKENS = 16
"""No tokeniser makes more tokens of a text than it has bytes, plus a few at its start. Usually it makes a quarter."""


def _five_decimals(rate: float) -> float:
    if round(rate, DECIMALS) != rate:
        raise ValueError(f"give it at most {DECIMALS} decimals")
    return rate


class TargetSettings(Section):
    """The model to prune, and how much of it."""

    model: str = Field(min_length=1)
    """A Hugging Face model name such as `meta-llama/Llama-2-7b-hf`, a folder, a GGUF file, or `smollm2` (135M
    parameters, to try things out)."""
    rate: Annotated[TargetRate, AfterValidator(_five_decimals)] | None = None
    """β: the share of the decoder layers' parameters to remove, above 0 and up to 0.9, such as 0.3."""
    rates: tuple[Annotated[TargetRate, AfterValidator(_five_decimals)], ...] = ()
    """In place of `rate`: several, such as `[0.2, 0.3, 0.4, 0.5]`. `selfpruner run` then searches for each of them in
    turn, with the search's name and the rate as names; each search learns from those before it. Together they take 1.5
    times the evaluations, tokens and hours of one search; without a surrogate (search.proposer other than `llm`, or
    llm.reply `lists` or `edits`), nothing is learnt, and each takes all of them."""
    parameters: Parameters | None = None
    """In place of `rate`: the most parameters that the pruned model may have, embeddings included, such as `5B`."""
    memory: Memory | None = None
    """In place of `rate`: the most memory that the pruned model may take, such as `10GB`: its weights in `dtype`, and
    its KV cache if `context` is given. The rate follows from the model's sizes, so this needs the worker's packages."""
    context: int = Field(default=0, ge=0)
    """Tokens of a text whose KV cache counts in `memory`. The dense model's cache counts, which is an upper bound."""
    batch: PositiveInt = 1
    """Number of such texts at once."""
    multiple_of: PositiveInt = 1
    """MLP widths are rounded to multiples of this many channels. 32, 64 or 128 makes the pruned model faster."""
    dtype: Dtype = "bfloat16"
    """Data type of weights and activations."""

    @model_validator(mode="before")
    @classmethod
    def _rates_replace_rate(cls, given: Any) -> Any:
        """Let `rates` replace the rate of a file, so that one setting makes a front of a search."""
        if isinstance(given, dict) and given.get("rates"):
            return {name: value for name, value in given.items() if name != "rate"}
        return given

    @model_validator(mode="after")
    def _has_one_size(self) -> "TargetSettings":
        given = [name for name in ("rate", "rates", "parameters", "memory") if getattr(self, name) not in (None, ())]
        if len(given) != 1:
            advice = "; `--set target.rate=null` removes the rate of a file" if "rate" in given else ""
            has = f"not {' and '.join(given)}{advice}" if given else "such as rate: 0.3"
            raise ValueError(f"give one of rate, rates, parameters and memory, {has}")
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates must rise, without a rate twice: {sorted(set(self.rates))}")
        if self.context and self.memory is None:
            raise ValueError("context counts in memory: give memory, too")
        return self

    @property
    def size(self) -> Size | None:
        """The size that the pruned model may have; None if the rate is given."""
        if self.parameters is None and self.memory is None:
            return None
        return Size(parameters=self.parameters, memory=self.memory, context=self.context, batch=self.batch)

    @property
    def known_rate(self) -> float:
        """The rate that is given, or that `with_rate` has found for the size; of several, the first."""
        rate = self.rates[0] if self.rates else self.rate
        assert rate is not None, "the settings are loaded, so that a size has its rate"
        return rate

    def with_rate(self) -> "TargetSettings":
        """Return these settings with the rate that a size needs, if it is not known. Raises UsageError."""
        if self.rate is not None or self.size is None:
            return self
        need("torch", "worker", "target.memory or target.parameters", ", or give target.rate")
        from gpu_worker.evaluation.sizes import rate_for

        return self.model_copy(update={"rate": rate_for(self.size, self.model, self.dtype, self.multiple_of)})


class DataSettings(Section):
    """The texts for scoring, for the search and for the report. Each is `wikitext2`, `c4`, a text file, `self` (text
    that the dense model generates), or a `.jsonl` or `.json` file of prompts with answers."""

    calibration: str = "wikitext2"
    """The text on which heads and channels are scored."""
    calibration_windows: PositiveInt = 128
    """Number of windows of data.calibration. More windows give a better reconstruction but a longer calibration. It
    runs once per worker and, with `scoring: sequential`, again for every candidate."""
    fitness: str = "wikitext2"
    """The text on which candidates are measured: what the pruned model should be good at, such as `texts/domain.txt`.
    In a file of prompts with answers, such as `tickets.jsonl`, each is a window, and only the answers count."""
    fitness_windows: PositiveInt | None = None
    """Number of windows of data.fitness; none means the whole text. With more windows, an evaluation takes longer; with
    few windows, the search overfits them."""
    report: str | None = None
    """A held-out text on which the dense model, uniform pruning, the best allocation, the best rule and the best
    candidate are measured at the end."""
    report_windows: PositiveInt | None = None
    """Number of windows of data.report; none means the whole text."""
    seqlen: int = Field(default=2048, ge=16)
    """Tokens per window, in all texts."""


def text_spec(source: str, windows: int | None, seqlen: int) -> TextSpec:
    """Return the spec of a named text, or of a file by its absolute path: a worker may run in another folder."""
    path = source if source in NAMED_TEXTS else str(expanded(source).absolute())
    return TextSpec(source=path, windows=windows, seqlen=seqlen)


def check_text(source: str) -> None:
    """Raise DataError for a text file that is not on this machine."""
    if source in NAMED_TEXTS or expanded(source).is_file():
        return
    near = difflib.get_close_matches(source, NAMED_TEXTS, n=1)
    advice = f"did you mean `{near[0]}`?" if near else f"give a file, or one of {', '.join(NAMED_TEXTS)}"
    raise DataError(f"there is no text file {source!r}; {advice}")


def check_lengths(texts: Mapping[Role, TextSpec]) -> None:
    """Raise DataError for a text file that is certainly too short for the windows of all its roles together."""
    files = [text for text in texts.values() if text.source not in NAMED_TEXTS and not is_examples(text.source)]
    for place in {text.place: None for text in files}:
        roles = {role: text for role, text in texts.items() if text.place == place}
        tokens = sum((text.windows or 1) * text.seqlen for text in roles.values())
        try:
            size = Path(place).stat().st_size
        except OSError:  # reported where the text is read
            continue
        if size + MORE_TOKENS < tokens:
            has = f"{size:,} bytes cannot give {tokens:,} tokens"
            source = next(iter(roles.values())).source
            raise DataError(f"the text {source!r} is too short: {has} {windows_in_words(roles)}")
