"""The texts by which fine-tuning is judged: dealt out as for an export, and measured before and after."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpu_worker.export.facts import ExportFacts
from gpu_worker.export.reopen import Exported
from gpu_worker.measuring.corpora import load_roles
from gpu_worker.measuring.kept_text import read_kept_text
from gpu_worker.measuring.perplexity import checked_perplexity
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress
from protocol.errors import SettingsError
from protocol.plans.spec import Role, SearchSpec, TextSpec, number_texts
from protocol.results.finetuning import Perplexities


@dataclass(frozen=True)
class EvalText:
    """A text that perplexities before and after are of; sizes that are None are those of the folder's card."""

    source: str
    windows: int | None = None
    seqlen: int | None = None

    def spec(self, usual: TextSpec) -> TextSpec:
        """With the sizes of the `usual` text where none were given."""
        windows = usual.windows if self.windows is None else self.windows
        return TextSpec(source=self.source, windows=windows, seqlen=self.seqlen or usual.seqlen)


@dataclass(frozen=True)
class Judged:
    """A text, and its tokens."""

    text: TextSpec
    windows: Tensor
    kept: bool = False
    """Whether they come with the folder."""

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)


def texts_asked(spec: SearchSpec, asked: Mapping[Role, EvalText]) -> dict[Role, TextSpec]:
    """The texts that were asked for, with the sizes of the folder's `spec` where none were given."""
    usual: dict[Role, TextSpec] = {"fitness": spec.fitness, "report": spec.report or spec.fitness}
    return {role: asked[role].spec(text) for role, text in usual.items() if role in asked}


def texts_to_judge(exported: Exported, model: LoadedModel, asked: Mapping[Role, EvalText]) -> dict[Role, Judged]:
    """The texts that were asked for; where no fitness text was, the one that the folder keeps, if it does.

    They are dealt out as for the export, so that windows it was pruned by stay out of them. `selfpruner evaluate` deals
    them out the same way from what the card says.
    """
    spec, found = exported.facts.spec, texts_asked(exported.facts.spec, asked)
    judged: dict[Role, Judged] = {}
    if "fitness" not in asked and exported.kept_text is not None:
        windows = read_kept_text(exported.kept_text, spec.fitness, model.decoder.head.out_features)
        judged["fitness"] = Judged(spec.fitness, windows, kept=True)
    texts: dict[Role, TextSpec] = {}
    if (role := scored_on(exported.facts, found)) is not None:
        texts["calibration"] = spec.calibration.model_copy(update={"source": found[role].source})
    texts |= found
    loaded = load_roles(texts, spec.seed, model.tokenizer, _not_written, model.window_start, found.keys())
    return judged | {role: Judged(text, loaded[role]) for role, text in found.items()}


def scored_on(facts: ExportFacts, texts: Mapping[Role, TextSpec]) -> Role | None:
    """Which of `texts` the folder was scored on, as far as can be told: it knows the last parts of paths only."""
    for role, text in texts.items():
        name, usual = Path(text.source).name, facts.spec.texts.get(role)
        was_measured = usual is not None and usual.source == name
        if facts.is_one_text("calibration", role) if was_measured else name == facts.spec.calibration.source:
            return role
    return None


def numbers_of(facts: ExportFacts, judged: Mapping[Role, Judged]) -> dict[Role, int]:
    """Which roles took their windows from one text when they were judged."""
    places: dict[Role, Hashable] = {role: each.text.place for role, each in judged.items()}
    scored = scored_on(facts, {role: each.text for role, each in judged.items()})
    return number_texts({"calibration": None if scored is None else places[scored], **places})


def _not_written(_windows: int, _length: int) -> Tensor:
    raise SettingsError(
        "a pruned model's own text is no measure of it: give --eval-data, a text file, `wikitext2` or `c4`"
    )


def measure(model: LoadedModel, judged: Mapping[Role, Judged], progress: Progress, stage: str) -> dict[Role, float]:
    """The perplexity of each text."""
    return {
        role: checked_perplexity(
            model.decoder, each.windows, progress, stage if role == "fitness" else f"{stage} on the report text"
        )[0]
        for role, each in judged.items()
    }


def compared(
    judged: Mapping[Role, Judged], before: Mapping[Role, float], after: Mapping[Role, float]
) -> dict[Role, Perplexities]:
    """What is told of each text; of a file the last part of its path."""
    return {
        role: Perplexities(
            text=each.text.model_copy(update={"source": Path(each.text.source).name}),
            before=before[role],
            after=after[role],
            tokens=each.predicted,
        )
        for role, each in judged.items()
    }
