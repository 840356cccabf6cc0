"""What prompts say about rules, and how rules are read from replies. Pure."""

import functools
import re
from collections.abc import Sequence

from pydantic import BaseModel, Field

from agents.operators.rules import at_rate, beginning, examples, is_tuned, proposal_of, rule_of, tuned, usable_features
from agents.population.submission import Call
from agents.population.view import Member, Proposal, View
from agents.prompting.descriptions import fitness_in_words, prediction_in_words
from agents.prompting.prompts import Prompt
from agents.prompting.replies import parse_objects
from agents.prompting.schemas import rules_schema
from protocol.errors import InvalidReply, RuleError
from protocol.plans.features import FEATURES, MEASURED
from protocol.plans.plan import removed_shares
from protocol.plans.rule import MAX_CHARACTERS, Rule

TOKENS_PER_RULE = 80
SHOWN_RULES = 4
SHOWN_UNITS = 4
"""Maximum number of units that a prompt names because a rule is wrong about them."""
MIN_POINTS = 4
"""Smallest difference that counts as wrong, in percentage points."""
SHOWN_EFFECTS = 4
MAX_TERMS = 3
"""Maximum number of terms that the pattern allows, so that no rule that it allows is too large."""
SHOWN_EXAMPLES = 2
INITIAL_IDEAS = (
    ("least_damage", "the most sensitive ones may need more or less than least_damage gives"),
    ("depth", "the first layers and the last are special"),
    ("influence", "what changes its input little can go"),
    ("attention", "attention and mlp need different formulas"),
    ("fit_error", "prune more where the fit loses little"),
    ("rate", "a step or a limit in place of a straight line"),
)
CHANGES = (
    ("rate", "add a term with a feature that it does not use"),
    ("rate", "replace one term"),
    ("attention", "let a term hold for attention or mlp only"),
    ("rate", "remove what does not help, and add one term"),
)
_QUOTE = re.compile(r"""'(?:\\.|[^'\\]){2,}'|"(?:\\.|[^"\\]){2,}\"""")
"""What an error quotes, which may be the model's words; single characters stay."""


class RuleReply(BaseModel):
    """A rule in a reply."""

    rule: str = Field(max_length=MAX_CHARACTERS)


def rules_prompt(name: str, text: str, call: Call, parents: Sequence[Member]) -> Prompt[Proposal]:
    """Return a prompt that asks for rules. The numbers of each rule are tuned on the surrogate before it is used."""
    view = call.view

    def use(reply: RuleReply) -> Proposal:
        try:
            return proposal_of(view, Rule.parse(reply.rule), parents)
        except RuleError as error:
            raise InvalidReply(f"is no rule: {_QUOTE.sub('a part', str(error))}") from None

    def refine(proposal: Proposal) -> Proposal:
        return proposal_of(view, tuned(view, Rule.parse(str(proposal.rule)), call.rng), parents)

    return Prompt(
        name=name,
        text=text,
        schema=lambda count: rules_schema(formula_pattern(usable_features(view), are_tuned=is_tuned(view)), count),
        parse=lambda text, count: parse_objects(text, RuleReply, use, count),
        tokens_per_item=TOKENS_PER_RULE,
        refine=refine,
        preview=(lambda draft: f"{draft.rule}: {prediction_in_words(view, draft.rates)}") if view.measured else None,
    )


@functools.lru_cache(maxsize=8)
def formula_pattern(features: tuple[str, ...], *, are_tuned: bool = True) -> str:
    """Return a regular expression for the beginning of rules and up to `MAX_TERMS` terms.

    A term is a number times a feature, or times a function or a step of one. Numbers that are not tuned afterwards are
    small. Small models need the pattern: without it, few of their rules begin with what was measured. If an endpoint
    does not enforce it, any rule that can be read is accepted.
    """
    feature = f"({'|'.join(name for name in features if name != 'rate')})"
    start = beginning(features)
    if feature == "()":
        return f"^{start}$"
    number = r"[0-2]\.[0-9]{1,2}"
    size = number if are_tuned else r"0\.0[1-9]"
    function = rf"(tanh|abs|exp|sqrt)\((-)?({number}\*)?{feature}\)"
    step = rf"where\({feature} [<>] (-)?{number}, {number}, {number}\)"
    factor = f"({feature}|{function}|{step})"
    term = rf"{size}\*{factor}(\*{feature})?"
    return rf"^{start}( [+-] {term}){{1,{MAX_TERMS}}}$"


def examples_of(view: View, variant: int) -> list[str]:
    """Return examples of rules that this search's features allow, other ones for the next variant.

    Small models copy what they are shown, so each question shows few examples, and different ones.
    """
    able = examples(view)
    return [able[(variant + i) % len(able)] for i in range(min(SHOWN_EXAMPLES, len(able)))]


def rules_in_general(view: View) -> dict[str, object]:
    """Return what `_rules_model` tells about rules."""
    names = usable_features(view)
    return {"features": features_in_words(view), "beginning": beginning(names), "tuned": is_tuned(view)}


def features_in_words(view: View) -> list[str]:
    """Return the features that rules may use: what each means, and the range of those that were measured."""
    words = []
    for name in usable_features(view):
        values = view.features[name]
        found = f", here {values[0]:g}" if name == "rate" else ""
        if name in MEASURED:
            found = f"; standardised among its kind, here from {min(values):.2g} to {max(values):.2g}"
        words.append(f"{name}: {FEATURES[name]}{found}")
    return words


def rules_in_words(view: View, members: Sequence[Member]) -> list[str]:
    """Return the rules of members with their fitness."""
    ruled = ((member, rule_of(member)) for member in members)
    return [f"{fitness_in_words(view, member)}: {at_rate(view, rule)}" for member, rule in ruled if rule]


def where_wrong(view: View, member: Member) -> list[str]:
    """Return the units that the best candidate prunes more or less than `member`'s rule does, largest first."""
    if not view.measured or view.measured[0].candidate.id == member.candidate.id:
        return []
    shape, granularity = view.profile.shape, view.spec.granularity
    best, ruled = (removed_shares(m.candidate.plan, shape, granularity) for m in (view.measured[0], member))
    points = {unit.name: round(100 * (a - b)) for unit, a, b in zip(view.units, best, ruled, strict=True)}
    largest = sorted((name for name in points if abs(points[name]) >= MIN_POINTS), key=lambda name: -abs(points[name]))
    return [f"{name} {points[name]:+d}" for name in largest[:SHOWN_UNITS]]


def effects_of_rules(view: View) -> list[str]:
    """Return what the last changes of rules did to the fitness, newest first."""
    known = {m.candidate.id: m for m in view.measured}
    words: list[str] = []
    for child in reversed(view.recent):
        parent = next((known[id_] for id_ in child.candidate.provenance.parents if id_ in known), None)
        rule, before = child.candidate.provenance.rule, rule_of(parent) if parent else None
        if rule is None or before is None or parent is None or child.fitness is None:
            continue
        stopped = ", and was stopped early" if child.stopped else ""
        words.append(
            f"{at_rate(view, before)} became {rule}: {100 * (child.fitness / parent.fitness - 1):+.1f} %{stopped}"
        )
        if len(words) == SHOWN_EFFECTS:
            break
    return words


def idea(view: View, ideas: Sequence[tuple[str, str]], variant: int) -> str:
    """Return one of the ideas, each given after the feature that it needs; other ones for the next variants."""
    usable = set(usable_features(view))
    able = [words for feature, words in ideas if feature in usable]
    return able[variant % len(able)]
