"""Rules as candidates: random rules, their mutation and crossover, and the tuning of their numbers. Pure, seeded.

This is genetic programming (Koza, 1992) over formulas of features (protocol/plans/rule.py). The numbers of a formula
are not guessed: CMA-ES tunes them on the surrogate, which costs no evaluation.
"""

import functools
import random
from collections.abc import Iterator, Sequence

import numpy as np

from agents.operators.acquisition import lowest_acquisition
from agents.operators.moves import KAPPA
from agents.operators.plan_space import Array, plan_space_of
from agents.operators.trust_region import random_length
from agents.population.view import Member, Proposal, View
from protocol.errors import RuleError
from protocol.plans.rule import Node, Rule

TERMS = (1, 4)
"""Fewest and most terms of a random rule."""
SPREAD = 0.1
"""Standard deviation of the numbers of new terms, and of the first generation when numbers are tuned."""
UNARY_SHARE = 0.2
"""Share of the random terms in which a function is applied to the feature."""
CROSSED = 20
"""Number of rules from which two are chosen for a crossover."""
GENERATIONS, GENERATION_SIZE = 20, 16
"""Size of a tuning: the surrogate predicts this number of generations, each of this number of plans."""
NOTICEABLE = 0.005
"""A part of a rule is left out if no rate changes by more than this."""
CORRECTIONS = (
    " - 0.05*attention - 0.04*fit_error",
    " - 0.06*exp(-1.5*depth)",
    " - 0.03*influence*mlp - 0.08*attention*first",
    " + 0.04*tanh(influence) - 0.05*last",
    " - 0.03*outliers - 0.07*where(depth < 0.1, 1.0, 0.0)",
    " - 0.06*sqrt(depth)*mlp + 0.02*lost_score",
)
"""What examples add to the beginning of a rule: what a prompt shows, and what random search begins with too."""
EXAMPLE_SHARE = 0.5
"""Share of random rules that are examples with other numbers."""
MIN_OUTCOMES = 4
"""Number of measured candidates from which on numbers are tuned. Before, the surrogate knows sensitivity only."""


def proposal_of(view: View, rule: Rule, parents: Sequence[Member] = ()) -> Proposal:
    """Return the candidate that a rule gives on this search's model. Raises RuleError if it needs a missing feature."""
    parent_ids = tuple(member.candidate.id for member in parents)
    return Proposal(rule.rates(view.features), parent_ids, str(rule), "rules")


@functools.lru_cache(maxsize=1000)
def _parsed(text: str) -> Rule | None:
    try:
        return Rule.parse(text)
    except RuleError:  # another version may have written it
        return None


def rule_of(member: Member) -> Rule | None:
    """Return the rule that a member's rates come from; None if they come from something else or it cannot be read."""
    text = member.candidate.provenance.rule
    return None if text is None else _parsed(text)


def at_rate(view: View, rule: Rule) -> Rule:
    """Return the rule with the search's rate in place of `rate`, and with constant parts computed.

    What a search finds holds for its rate. A rule that begins with the rate keeps it.
    """
    if not {"least_damage", "rate"} <= rule.features:
        return rule
    return _sound(_at_rate(rule.tree, view.spec.rate), rule)


def _at_rate(tree: Node, rate: float) -> Node:
    """Return the tree with a number for each part that has no feature but the rate."""
    if tree.head == "rate":
        return Node(rate)
    tree = Node(tree.head, tuple(_at_rate(part, rate) for part in tree.parts))
    number = _number(tree) if tree.parts else None
    return tree if number is None else Node(float(f"{number.head:.4g}"))


def ruled_members(view: View, members: Sequence[Member]) -> list[Member]:
    """Return the members whose rates come from rules: first those among `members`, then all others, best first."""
    by_id = {member.candidate.id: member for member in (*members, *view.measured) if rule_of(member)}
    return list(by_id.values())


def usable_features(view: View) -> tuple[str, ...]:
    """Return the features that differ between units of this search, or are its rate."""
    return tuple(name for name, values in view.features.items() if name == "rate" or len(set(values)) > 1)


def differing_features(view: View) -> list[str]:
    """Return the features that differ between units of this search; none in a model with one unit."""
    return [name for name in usable_features(view) if name != "rate"]


def is_tuned(view: View) -> bool:
    """Return whether the numbers of new rules are tuned: the surrogate knows enough outcomes."""
    return len(view.measured) >= MIN_OUTCOMES


def tuned(view: View, rule: Rule, rng: random.Random) -> Rule:
    """Return the rule with the numbers for which the surrogate has the best acquisition near the given ones.

    The rates stay near those of a plan of the population, because the surrogate errs far from all of them. Parts that
    then have no effect are left out. Returns the rule unchanged while too few candidates are measured.
    """
    rule = at_rate(view, rule)
    if not rule.numbers or not is_tuned(view):
        return rule
    from cmaes import CMA  # not at the start: it loads SciPy, which takes a second

    count = len(rule.numbers)
    start = np.array([*rule.numbers, *[0.0] * (count == 1)])  # CMA needs two dimensions
    optimizer = CMA(start, SPREAD, seed=rng.getrandbits(32), population_size=GENERATION_SIZE)
    found = lowest_acquisition(
        view,
        optimizer,
        GENERATIONS,
        KAPPA,
        lambda samples: rule.rates_with(view.features, samples[:, :count].astype(float)),
        first=start,
        region=(np.array([member.candidate.rates for member in view.population]), random_length(rng)),
    )
    return simplified(view, rule.with_numbers(found[:count].tolist()))


def simplified(view: View, rule: Rule) -> Rule:
    """Return the rule without the parts, and with the smallest and shortest numbers, that change no rate noticeably."""
    space = plan_space_of(view)

    def rates(given: Rule) -> Array:
        return space.rates(np.array([given.rates(view.features)]))

    wanted = rates(rule)

    def is_same(other: Rule) -> bool:
        return bool(np.abs(rates(other) - wanted).max() <= NOTICEABLE)

    if is_same(collected := _collected(rule)):
        rule = collected
    while shorter := next(filter(is_same, _shorter(rule)), None):
        rule = shorter
    for i in range(len(rule.numbers)):
        while abs(rule.numbers[i]) > 1 and is_same(smaller := _with_number(rule, i, rule.numbers[i] / 2)):
            rule = smaller
    for digits in (1, 2, 3):
        rounded = rule.with_numbers([float(f"{number:.{digits}g}") for number in rule.numbers])
        if is_same(rounded):
            return rounded
    return rule


def _collected(rule: Rule) -> Rule:
    """Return the rule with equal terms of its sum added up: `1.24*depth - 1.2*depth` becomes `0.04*depth`."""
    found = list(_terms(rule.tree, 1.0))
    terms: dict[Node, float] = {}
    for number, factor in found:
        terms[factor] = terms.get(factor, 0.0) + number
    if len(terms) == len(found):
        return rule
    tree: Node | None = None
    for factor, number in sorted(terms.items(), key=lambda term: term[1] < 0):  # a positive term first
        sized = factor if abs(number) == 1 else _times(abs(number), factor)
        if tree is None:
            tree = sized if number >= 0 else Node("-", (Node(0.0), sized))
        else:
            tree = Node("+" if number >= 0 else "-", (tree, sized))
    return rule if tree is None else _sound(tree, rule)


def _terms(tree: Node, sign: float) -> Iterator[tuple[float, Node]]:
    """Yield each term of a sum as a number and what it is multiplied by."""
    if tree.head in ("+", "-") and len(tree.parts) == 2:
        yield from _terms(tree.parts[0], sign)
        yield from _terms(tree.parts[1], sign if tree.head == "+" else -sign)
    elif tree.head == "negative":
        yield from _terms(tree.parts[0], -sign)
    else:
        number, factor = _factored(tree)
        yield sign * number, factor


def _times(number: float, factor: Node) -> Node:
    """Return the product, with the number at its beginning."""
    if factor.head == "*":
        return Node("*", (_times(number, factor.parts[0]), factor.parts[1]))
    return Node("*", (Node(number), factor))


def _factored(term: Node) -> tuple[float, Node]:
    """Return the number that a product begins with, and the rest of it; 1 and the term if it begins with none."""
    if term.head == "*":
        first, second = term.parts
        if isinstance(first.head, float):
            return first.head, second
        number, rest = _factored(first)
        return number, Node("*", (rest, second))
    return 1.0, term


def _with_number(rule: Rule, which: int, number: float) -> Rule:
    return rule.with_numbers([*rule.numbers[:which], number, *rule.numbers[which + 1 :]])


def _shorter(rule: Rule) -> Iterator[Rule]:
    """Return the rules with one part replaced by a part of it or by a number, shortest first; all keep the rate."""
    parts = [part for part in rule.tree if part.parts]
    trees = {replaced(rule.tree, part, new) for part in parts for new in (*part.parts, _number(part) or Node(0.0))}
    kept = rule.features & {"rate", "least_damage"}
    rules = {_sound(tree, rule) for tree in trees} - {rule}
    return iter(sorted((each for each in rules if kept <= each.features), key=lambda each: (_size(each), str(each))))


def _number(part: Node) -> Node | None:
    """Return the number that a part without features is; None for other parts."""
    leaves = [node.head for node in part if not node.parts]
    if not all(isinstance(leaf, float) for leaf in leaves):
        return None
    return Node(float(part.evaluate({}, iter(np.array(leaves)))))


def _size(rule: Rule) -> int:
    return sum(1 for _ in rule.tree)


def beginning(features: Sequence[str]) -> str:
    """Return the feature that rules begin with: the allocation by sensitivity, or the rate if it was not measured."""
    return "least_damage" if "least_damage" in features else "rate"


def examples(view: View) -> list[str]:
    """Return the examples of rules that this search's features allow."""
    usable = usable_features(view)
    texts = (beginning(usable) + correction for correction in CORRECTIONS)
    return [text for text in texts if Rule.parse(text).features <= {*usable}]


def random_rule(rng: random.Random, view: View) -> Rule:
    """Return an example with other numbers, or its beginning plus a few random terms.

    A term is a number times a feature, or times a feature of one kind.
    """
    tree = Node(beginning(usable_features(view)))
    if not differing_features(view):
        return Rule.of(tree)
    if rng.random() < EXAMPLE_SHARE and (able := examples(view)):
        example = Rule.parse(rng.choice(able))
        return example.with_numbers([number * rng.uniform(0.5, 2) for number in example.numbers])
    for _ in range(rng.randint(*TERMS)):
        tree = Node("+", (tree, _term(rng, view)))
    return Rule.of(tree)


def _term(rng: random.Random, view: View) -> Node:
    factor = Node(rng.choice(differing_features(view)))
    if rng.random() < UNARY_SHARE:
        factor = Node(rng.choice(("tanh", "abs", "exp")), (factor,))
    if view.spec.granularity == "block" and rng.random() < 0.5:
        factor = Node("*", (factor, Node(rng.choice(("attention", "mlp")))))
    return Node("*", (Node(rng.gauss(0, SPREAD)), factor))


def mutated(rng: random.Random, view: View, rule: Rule) -> Rule:
    """Return the rule with a new term, without a part, or with a part replaced by a new term."""
    kind = rng.random()
    if not differing_features(view):
        return rule
    if kind < 0.4:
        return _sound(Node("+", (rule.tree, _term(rng, view))), rule)
    part = rng.choice(list(rule.tree))
    return _sound(replaced(rule.tree, part, Node(0.0) if kind < 0.6 else _term(rng, view)), rule)


def crossed(rng: random.Random, first: Rule, second: Rule) -> Rule:
    """Return `first` with a random part of `second`, added to it or in place of a part."""
    part = rng.choice(list(second.tree))
    if rng.random() < 0.5:
        return _sound(Node("+", (first.tree, part)), first)
    return _sound(replaced(first.tree, rng.choice(list(first.tree)), part), first)


def replaced(tree: Node, part: Node, new: Node) -> Node:
    """Return `tree` with `new` in place of the node `part` (the same object)."""
    if tree is part:
        return new
    return Node(tree.head, tuple(replaced(each, part, new) for each in tree.parts))


def _sound(tree: Node, otherwise: Rule) -> Rule:
    """Return a tree as a rule, or another rule if the tree is too large or compares outside of `where`."""
    try:
        return Rule.of(tree)
    except RuleError:
        return otherwise


def sample_rule(rng: random.Random, view: View, _parents: Sequence[Member]) -> Proposal:
    """Return the candidate of a random rule with tuned numbers."""
    return proposal_of(view, tuned(view, random_rule(rng, view), rng))


def sample_rule_mutation(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return the candidate of a mutation of a rule, with tuned numbers; rules of parents and good ones are likelier."""
    ruled = ruled_members(view, parents)
    if not ruled:
        return sample_rule(rng, view, parents)
    parent = ruled[min(rng.randrange(len(ruled)), rng.randrange(len(ruled)))]
    return proposal_of(view, tuned(view, mutated(rng, view, _rule_of(parent)), rng), [parent])


def sample_rule_crossover(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return the candidate of a crossover of two good rules, with tuned numbers."""
    ruled = ruled_members(view, parents)[:CROSSED]
    if len(ruled) < 2:
        return sample_rule_mutation(rng, view, parents)
    one, other = rng.sample(ruled, 2)
    return proposal_of(view, tuned(view, crossed(rng, _rule_of(one), _rule_of(other)), rng), [one, other])


def _rule_of(member: Member) -> Rule:
    rule = rule_of(member)
    assert rule is not None, "ruled_members returns only members with a rule"
    return rule
