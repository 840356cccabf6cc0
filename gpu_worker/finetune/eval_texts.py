"""The texts that perplexity is measured on before and after fine-tuning, with the windows of the export."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpu_worker.export.exported_folder import ExportedFolder
from gpu_worker.export.facts import ExportFacts
from gpu_worker.measuring.corpora import load_roles
from gpu_worker.measuring.perplexity import checked_perplexity
from gpu_worker.measuring.self_text import load_saved_text
from gpu_worker.measuring.windows import predicted_tokens
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress
from protocol.errors import SettingsError
from protocol.plans.spec import Role, SearchSpec, TextSpec, number_texts
from protocol.results.finetuning import Perplexities


@dataclass(frozen=True)
class EvalText:
    """A requested evaluation text. Sizes that are None are taken from the folder's card."""

    source: str
    windows: int | None = None
    seqlen: int | None = None

    def spec(self, usual: TextSpec) -> TextSpec:
        """Return the text with missing sizes taken from the `usual` text."""
        windows = usual.windows if self.windows is None else self.windows
        return TextSpec(source=self.source, windows=windows, seqlen=self.seqlen or usual.seqlen)


@dataclass(frozen=True)
class EvalTokens:
    """An evaluation text with its tokens."""

    text: TextSpec
    windows: Tensor
    kept: bool = False
    """Whether the tokens were saved in the folder."""

    @property
    def predicted(self) -> int:
        """Return the number of predicted tokens."""
        return predicted_tokens(self.windows)


def requested_texts(spec: SearchSpec, asked: Mapping[Role, EvalText]) -> dict[Role, TextSpec]:
    """Return the requested texts, with missing sizes taken from the folder's `spec`."""
    usual: dict[Role, TextSpec] = {"fitness": spec.fitness, "report": spec.report or spec.fitness}
    return {role: asked[role].spec(text) for role, text in usual.items() if role in asked}


def load_eval_texts(
    exported: ExportedFolder, model: LoadedModel, asked: Mapping[Role, EvalText]
) -> dict[Role, EvalTokens]:
    """Load the requested texts. If no fitness text is requested, load the text saved in the folder, if any.

    Windows are distributed as for the export, so that the calibration windows are excluded. `selfpruner evaluate`
    distributes them in the same way.
    """
    spec, found = exported.facts.spec, requested_texts(exported.facts.spec, asked)
    eval_tokens: dict[Role, EvalTokens] = {}
    if "fitness" not in asked and exported.saved_text is not None:
        windows = load_saved_text(exported.saved_text, spec.fitness, model.decoder.head.out_features)
        eval_tokens["fitness"] = EvalTokens(spec.fitness, windows, kept=True)
    texts: dict[Role, TextSpec] = {}
    if (role := calibration_role(exported.facts, found)) is not None:
        texts["calibration"] = spec.calibration.model_copy(update={"source": found[role].source})
    texts |= found
    loaded = load_roles(texts, spec.seed, model.tokenizer, _not_written, model.window_start, found.keys())
    return eval_tokens | {role: EvalTokens(text, loaded[role]) for role, text in found.items()}


def calibration_role(facts: ExportFacts, texts: Mapping[Role, TextSpec]) -> Role | None:
    """Return the role whose text the folder was calibrated on, as far as file names without folders show."""
    for role, text in texts.items():
        name, usual = Path(text.source).name, facts.spec.texts.get(role)
        was_measured = usual is not None and usual.source == name
        if facts.is_one_text("calibration", role) if was_measured else name == facts.spec.calibration.source:
            return role
    return None


def shared_text_numbers(facts: ExportFacts, eval_tokens: Mapping[Role, EvalTokens]) -> dict[Role, int]:
    """Number the texts: roles with the same number took their windows from the same text."""
    places: dict[Role, Hashable] = {role: each.text.place for role, each in eval_tokens.items()}
    scored = calibration_role(facts, {role: each.text for role, each in eval_tokens.items()})
    return number_texts({"calibration": None if scored is None else places[scored], **places})


def _not_written(_windows: int, _length: int) -> Tensor:
    raise SettingsError(
        "a pruned model cannot be measured on its own text: give --eval-data a text file, `wikitext2` or `c4`"
    )


def measure(
    model: LoadedModel, eval_tokens: Mapping[Role, EvalTokens], progress: Progress, stage: str
) -> dict[Role, float]:
    """Measure the perplexity of each text."""
    return {
        role: checked_perplexity(
            model.decoder, each.windows, progress, stage if role == "fitness" else f"{stage} on the report text"
        )[0]
        for role, each in eval_tokens.items()
    }


def perplexity_changes(
    eval_tokens: Mapping[Role, EvalTokens], before: Mapping[Role, float], after: Mapping[Role, float]
) -> dict[Role, Perplexities]:
    """Return perplexities before and after for each text; file names are given without folders."""
    return {
        role: Perplexities(
            text=each.text.model_copy(update={"source": Path(each.text.source).name}),
            before=before[role],
            after=after[role],
            tokens=each.predicted,
        )
        for role, each in eval_tokens.items()
    }
