"""Descriptions of the target model and of the population for prompts, in words and short numbers. Pure."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath

import numpy as np

from agents.operators.edits import KEPT_CHOICES
from agents.operators.mixes import RankedMix
from agents.operators.moves import Move
from agents.operators.plan_space import plan_space_of
from agents.operators.surrogate import surrogate_of
from agents.population.view import Member, View
from agents.prompting.settings import FeedbackPart
from protocol.plans.shape import Granularity
from protocol.plans.spec import FIGURE_DIGITS, MEASURE_NAMES

SECTIONS = 5

FITNESS_IN_FULL = {
    "perplexity": "perplexity of the pruned model",
    "kl": "KL divergence of the pruned model from the unpruned one",
}
"""The fitness, in the words of the prompts."""

TEXTS = {"wikitext2": "the WikiText-2 dataset", "c4": "the C4 dataset", "self": "text of its own"}


@dataclass(frozen=True)
class AboutModel:
    """The target model and the goal of the search, as prompts state them."""

    model: str
    granularity: Granularity
    layers: int
    units: int
    query_heads: int
    kv_heads: int
    channels: int
    mlp_weight: str
    """Parameters of an MLP block divided by those of an attention block."""
    rate: str
    percent: str
    text: str
    fitness: str
    """Perplexity or KL divergence."""
    fitness_in_full: str
    fragile: tuple[str, ...]
    """Names of the units that hurt most when pruned alone, worst first."""
    robust: tuple[str, ...]


def _shown_name(model: str) -> str:
    """Return a model's name without the folders of this machine, which are no one else's business."""
    return PurePath(model).name if model.startswith(("/", ".", "~")) else model


def about_model(view: View, parts: Collection[FeedbackPart]) -> AboutModel:
    """Return the description of this search's model; the widths are those of its first layer."""
    spec, shape = view.spec, view.profile.shape
    ranked = tuple(unit.name for unit in view.by_fragility) if "sensitivity" in parts else ()
    attention, mlp = shape.units("block")[:2]
    return AboutModel(
        model=_shown_name(view.profile.model),
        granularity=spec.granularity,
        layers=len(shape.layers),
        units=len(view.units),
        query_heads=shape.layers[0].query_heads,
        kv_heads=shape.layers[0].kv_heads,
        channels=shape.layers[0].mlp_channels,
        mlp_weight=f"{mlp.parameters / attention.parameters:.2g}",
        rate=f"{spec.rate:g}",
        percent=f"{100 * spec.rate:g}",
        text=TEXTS.get(spec.fitness.source, "a text"),
        fitness=MEASURE_NAMES[spec.measure],
        fitness_in_full=FITNESS_IN_FULL[spec.measure],
        fragile=ranked[:KEPT_CHOICES],
        robust=ranked[KEPT_CHOICES:][: -KEPT_CHOICES - 1 : -1],
    )


def percents(view: View, rates: Sequence[float]) -> dict[str, list[int]]:
    """Return the rates in whole percent by layer, for each kind of block."""
    kinds: dict[str, list[int]] = {}
    for unit, rate in zip(view.units, rates, strict=True):
        kinds.setdefault(unit.kind, []).append(round(100 * rate))
    return kinds


def sections(view: View, rates: Sequence[float]) -> dict[str, list[int]]:
    """Return the rates in whole percent by section of depth, for prompts that show many configurations."""
    return {kind: _averages(by_layer) for kind, by_layer in percents(view, rates).items()}


def _averages(values: Sequence[int]) -> list[int]:
    count = min(SECTIONS, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [round(sum(values[a:b]) / (b - a)) for a, b in pairwise(edges)]


def decimals(rates: Sequence[float]) -> str:
    """Return the rates as the paper writes them."""
    return "[" + ", ".join(f"{rate:.5f}" for rate in rates) + "]"


def numbered_lists(view: View, members: Sequence[Member]) -> list[dict[str, str]]:
    """Return the members with all decimals of their rates, for the `lists` prompts."""
    return [{"rates": decimals(m.candidate.rates), "fitness": fitness_in_words(view, m, more=1)} for m in members]


def numbered_profiles(view: View, members: Sequence[Member]) -> list[dict[str, object]]:
    """Return the members in whole percent, for the `edits` prompts."""
    return [{"percents": percents(view, m.candidate.rates), "fitness": fitness_in_words(view, m)} for m in members]


def moves_in_words(view: View, parent: Member, moves: Sequence[Move]) -> list[str]:
    """Return moves as the `moves` prompts list them: `mlp 3 +4, mlp 17 -4: -0.8 % (+-0.5)`.

    Changes of rates are in percentage points. The predicted change is in percent of the perplexity (computed from the
    change of its logarithm) or in percent of the parent's divergence.
    """
    is_kl = view.spec.measure == "kl" and parent.fitness > 0
    unit = parent.fitness if is_kl else 1.0
    words = []
    for move in moves:
        sides = ((move.more, move.more_rate), (move.less, move.less_rate))
        sides_in_words = ", ".join(_side(view, number, rate, parent.candidate.rates) for number, rate in sides)
        change = move.mean / unit if is_kl else math.expm1(move.mean)
        words.append(f"{sides_in_words}: {100 * change:+.1f} % (+-{100 * move.std / unit:.1f})")
    return words


def _side(view: View, unit: int, rate: float, rates: Sequence[float]) -> str:
    return f"{view.units[unit].name} {100 * (rate - rates[unit]):+.0f}"


def mixes_in_words(view: View, parents: Sequence[Member], mixes: Sequence[RankedMix]) -> list[str]:
    """Return mixes as the `moves` prompts list them."""
    words = []
    for ranked in mixes:
        mix = ranked.mix
        base, donor = (parents[int(number) - 1] for number in mix.parents.split("+"))
        blocks = "layers" if mix.block in (None, "both") else f"{mix.block} of layers"
        words.append(
            f"{blocks} {mix.first} to {mix.first + mix.layers - 1} of {fitness_in_words(view, donor)} "
            f"in {fitness_in_words(view, base)}: about {ranked.predicted:.{FIGURE_DIGITS[view.spec.measure]}f}"
        )
    return words


def numbered_sections(view: View, members: Sequence[Member]) -> list[dict[str, object]]:
    """Return the members in whole percent by section, for the Selector."""
    return [{"percents": sections(view, m.candidate.rates), "fitness": fitness_in_words(view, m)} for m in members]


def prediction_in_words(view: View, rates: Sequence[float]) -> str:
    """Return what the surrogate predicts of raw rates: `KL divergence 0.3512 (+-0.0040)`."""
    surrogate = surrogate_of(view)
    (mean,), (std,) = surrogate.predict_shares(plan_space_of(view).shares(np.array([rates])))
    fitness, above = surrogate.fitness_at(mean), surrogate.fitness_at(mean + std)
    digits = FIGURE_DIGITS[view.spec.measure]
    return f"{MEASURE_NAMES[view.spec.measure]} {fitness:.{digits}f} (+-{above - fitness:.{digits}f})"


def fitness_in_words(view: View, member: Member, more: int = 0) -> str:
    """Return a member's fitness with enough decimals to distinguish members, and `more` decimals in addition."""
    return f"{member.fitness:.{FIGURE_DIGITS[view.spec.measure] + more}f}"
