"""The perplexity that the model card of an exported folder states, so that `selfpruner evaluate DIR` re-measures it.

Imports no torch, so that a missing text is reported immediately.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpu_worker.export.facts import read_facts
from gpu_worker.export.folder import formats_in
from gpu_worker.progress import Progress
from protocol.errors import DataError, ModelError, SettingsError
from protocol.plans.spec import NAMED_TEXTS, Dtype, Role, SearchSpec, TextSpec
from protocol.results.commands import EvaluationResult
from protocol.results.formats import FACTS, SAVED_TEXT, only_for_llama_cpp
from protocol.runtime.paths import expanded


@dataclass(frozen=True)
class Stated:
    """What a model card states for one text: the perplexity, and the digest of the tokens."""

    perplexity: float
    digest: str | None


@dataclass(frozen=True)
class CardMeasurement:
    """The texts that an unpruned or exported model is measured on, and what its card states."""

    texts: Mapping[Role, TextSpec]
    seed: int
    dtype: Dtype
    stated: Mapping[Role, Stated] = field(default_factory=dict)
    """What the card states for each role in `texts`; empty for a card without figures."""
    names: str | None = None
    """Names of the texts on the card."""
    saved_text: Path | None = None
    """The file with the tokens, if the dense model generated them."""

    def changed(self, dtype: Dtype | None, seed: int | None) -> "CardMeasurement":
        """Return this measurement with another dtype or seed, if given. With another dtype, the card states nothing.

        Raises SettingsError for a seed if the folder contains the tokens.
        """
        if seed is not None and self.saved_text is not None:
            raise SettingsError("--seed has no effect here: the folder contains the tokens that it was measured on")
        return replace(
            self,
            dtype=dtype or self.dtype,
            seed=self.seed if seed is None else seed,
            stated=self.stated if dtype in (None, self.dtype) else {},
        )

    def on(self, texts: Mapping[Role, TextSpec]) -> "CardMeasurement":
        """Return this measurement on other texts or windows, which may turn out to be the same tokens."""
        return replace(self, texts=texts, saved_text=None)

    def run(self, model: str, progress: Progress) -> EvaluationResult:
        """Measure `model`; the result includes the card's perplexities of the same tokens."""
        from gpu_worker.evaluation.one_shot import evaluate_model

        found = evaluate_model(
            model, self.texts, dtype=self.dtype, seed=self.seed, saved_text=self.saved_text, progress=progress
        )
        fitness, report = (
            self._of_tokens("fitness", found.fitness_digest),
            self._of_tokens("report", found.report_digest),
        )
        is_other = fitness is None or (found.report_digest is not None and report is None)
        others = self.names if self.stated and is_other else None
        return found.model_copy(
            update={"card_perplexity": fitness, "card_report_perplexity": report, "card_texts": others}
        )

    def _of_tokens(self, role: Role, digest: str | None) -> float | None:
        """Return what the card states for these tokens."""
        stated = self.stated.get(role)
        return stated.perplexity if stated and digest is not None and digest == stated.digest else None


def measurement_of(spec: SearchSpec, numbers: Mapping[Role, int], saved_text: Path | None) -> CardMeasurement:
    """Return the measurement of a model that was pruned by `spec`, whose texts have these `numbers`."""
    texts = _windows_in_text_of("fitness", spec, numbers)
    if saved_text is not None:
        texts = {"fitness": spec.fitness}
    return CardMeasurement(texts, spec.seed, spec.dtype, saved_text=saved_text)


def card_measurement(folder: str, data: str | None, report_data: str | None = None) -> CardMeasurement | None:
    """Return what the card of an exported folder states; None for other models.

    The card has only the names of files. `data` is the path of the fitness text, or of the report text if it has that
    text's name; without it, the fitness text is looked up by its name. `report_data` is the path of the report text.
    Raises ModelError for a folder with nothing but a GGUF file, and DataError if the text is not available.
    """
    path = Path(folder) / FACTS
    if not path.is_file():
        return None
    try:
        formats, facts = formats_in(Path(folder)), read_facts(Path(folder))
    except ModelError as error:
        if data is not None:
            return None
        raise DataError(f"{path} does not say what {folder!r} was measured on: pass a text with --data") from error
    if formats == ("gguf",):
        raise ModelError(only_for_llama_cpp(folder))
    spec, saved_text = facts.spec, None
    name = spec.fitness.source
    if data is None and name == "self":
        saved_text = Path(folder) / SAVED_TEXT
        if not saved_text.is_file():
            raise DataError(f"{folder!r} was measured on text that the dense model generated: give --data, a text file")
    elif data is None:
        data = _found(folder, name)
    stated: dict[Role, Stated] = {}
    if facts.pruned is not None:
        stated["fitness"] = Stated(facts.pruned.perplexity, facts.fitness_digest)
    if facts.pruned_report is not None:
        stated["report"] = Stated(facts.pruned_report.perplexity, facts.report_digest)
    found = measurement_of(spec, facts.text_numbers, saved_text)
    texts = dict(found.texts) if data is None else _read_from(data, found.texts)
    if spec.report is not None and not facts.is_one_text("fitness", "report"):
        of_report = _windows_in_text_of("report", spec, facts.text_numbers)
        if report_data is not None:
            texts |= _read_from(report_data, of_report)
        elif data not in (None, *NAMED_TEXTS) and _name(data) == _name(spec.report.source) != _name(name):
            # The measured text is called fitness in a result.
            texts = _read_from(data, _called_fitness(of_report))
            stated = {"fitness": stated["report"]} if "report" in stated else {}
    elif report_data is not None and spec.report is None:
        texts["report"] = TextSpec(source=report_data, windows=None, seqlen=spec.fitness.seqlen)
    elif (
        report_data is not None
        and texts["report"].place != texts["report"].model_copy(update={"source": report_data}).place
    ):
        raise SettingsError(
            "on the model card, the report windows are from the text of --data: leave out --report-data"
        )
    texts_on_card = [_name(text.source) for text in (spec.fitness, spec.report) if text is not None]
    names = None if "self" in texts_on_card else " and ".join(dict.fromkeys(texts_on_card))
    return replace(found, texts=texts, stated=stated, names=names)


def _windows_in_text_of(role: Role, spec: SearchSpec, numbers: Mapping[Role, int]) -> dict[Role, TextSpec]:
    """Return the texts of all roles that took their windows from the text of `role`, because each takes others."""
    return {other: text for other, text in spec.texts.items() if numbers.get(other) == numbers.get(role)}


def _called_fitness(texts: Mapping[Role, TextSpec]) -> dict[Role, TextSpec]:
    """Return the texts with the report text as the fitness text, which a measurement always has."""
    return {("fitness" if role == "report" else role): text for role, text in texts.items()}


def _read_from(source: str, texts: Mapping[Role, TextSpec]) -> dict[Role, TextSpec]:
    return {role: text.model_copy(update={"source": source}) for role, text in texts.items()}


def _found(folder: str, name: str) -> str:
    """Return a text of the card by its name, as it stands in the working folder."""
    if name in NAMED_TEXTS:
        return name
    if not expanded(name).is_file():
        raise DataError(f"{folder!r} was measured on a file {name!r}, which was not found; pass its path with --data")
    return str(expanded(name).absolute())


def _name(source: str) -> str:
    return Path(source).name
