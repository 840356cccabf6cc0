"""The perplexity that the model card of an exported folder states, so that `selfpruner evaluate DIR` re-measures it.

Imports no torch, so that a missing text is reported immediately.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
class CardMeasurement:
    """The texts that an unpruned or exported model is measured on, and the perplexity that its card states."""

    texts: Mapping[Role, TextSpec]
    seed: int
    dtype: Dtype
    perplexity: float | None = None
    """Perplexity that the card states; None if the card states none for these texts."""
    fitness_digest: str | None = None
    saved_text: Path | None = None
    """The file with the tokens, if the dense model generated them."""

    def changed(self, dtype: Dtype | None, seed: int | None) -> "CardMeasurement":
        """Return this measurement with another dtype or seed, if given. Another dtype drops the perplexity.

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

    def run(self, model: str, progress: Progress) -> EvaluationResult:
        """Measure `model`; the result includes the card's perplexity if that was measured on the same tokens."""
        from gpu_worker.evaluation.one_shot import evaluate_model

        found = evaluate_model(
            model, self.texts, dtype=self.dtype, seed=self.seed, saved_text=self.saved_text, progress=progress
        )
        stated = self.perplexity if found.fitness_digest == self.fitness_digest else None
        return found.model_copy(update={"card_perplexity": stated})


def measurement_of(spec: SearchSpec, numbers: Mapping[Role, int], saved_text: Path | None) -> CardMeasurement:
    """Return the measurement of a model that was pruned by `spec`, whose texts have these `numbers`."""
    # A role with another text takes no windows from the fitness text, so it is left out.
    texts = {role: text for role, text in spec.texts.items() if numbers.get(role) == numbers.get("fitness")}
    if saved_text is not None:
        texts = {"fitness": spec.fitness}
    return CardMeasurement(texts, spec.seed, spec.dtype, saved_text=saved_text)


def card_measurement(folder: str, file: str | None) -> CardMeasurement | None:
    """Return what the card of an exported folder states; None for other models.

    The card has only file names. `file` is the path of the text; without it, the text is looked up by its name. Raises
    ModelError for a folder with nothing but a GGUF file, and DataError if the text is not available.
    """
    path = Path(folder) / FACTS
    if not path.is_file():
        return None
    try:
        formats, facts = formats_in(Path(folder)), read_facts(Path(folder))
    except ModelError as error:
        if file is not None:
            return None
        raise DataError(f"{path} does not say what {folder!r} was measured on: pass a text with --data") from error
    if formats == ("gguf",):
        raise ModelError(only_for_llama_cpp(folder))
    spec, saved_text = facts.spec, None
    name = spec.fitness.source
    if file is None and name == "self":
        saved_text = Path(folder) / SAVED_TEXT
        if not saved_text.is_file():
            raise DataError(f"{folder!r} was measured on text that the dense model generated: give --data, a text file")
    elif file is None and name not in NAMED_TEXTS:
        if not expanded(name).is_file():
            raise DataError(
                f"{folder!r} was measured on a file {name!r}, which was not found; pass its path with --data"
            )
        file = str(expanded(name).absolute())
    found = measurement_of(spec, facts.text_numbers, saved_text)
    source = {} if file is None else {"source": file}
    texts = {role: text.model_copy(update=source) for role, text in found.texts.items()}
    stated = None if facts.pruned is None else facts.pruned.perplexity
    return replace(found, texts=texts, perplexity=stated, fitness_digest=facts.fitness_digest)
