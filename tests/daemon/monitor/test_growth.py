"""What is asked again and again costs as much as what is new, and says the same as a count of everything."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from agents.population.population import Population
from daemon.monitor.status import Tally
from daemon.search.state import Proposals
from protocol.plans.candidate import Candidate
from tests.support.samples import candidate, candidates, measured


class WatchedLedger(dict[str, Candidate]):
    """A ledger that counts how many of its candidates are looked at."""

    looked_at = 0

    def values(self) -> Any:
        return WatchedValues(self)


class WatchedValues:
    def __init__(self, ledger: WatchedLedger) -> None:
        self._ledger = ledger

    def __iter__(self) -> Iterator[Candidate]:
        return self._watch(iter(dict.values(self._ledger)))

    def __reversed__(self) -> Iterator[Candidate]:
        return self._watch(reversed(dict.values(self._ledger)))

    def _watch(self, found: Iterator[Candidate]) -> Iterator[Candidate]:
        for each in found:
            self._ledger.looked_at += 1
            yield each


def test_a_look_at_a_long_history_costs_as_much_as_what_is_new_in_it() -> None:
    many = candidates(300)
    ledger, population, tally = WatchedLedger(), Population(), Tally()
    found = []
    for number, each in enumerate(many):
        ledger[each.id] = each
        population.insert(each, measured(1000.0 - number, each))
        if number % 3 == 0:
            found += tally.take(ledger, population)
    found += tally.take(ledger, population)
    assert ledger.looked_at <= len(many) + 100  # one beyond, at most, of each look
    assert [(e.candidate, best) for e, best in found] == [(each, True) for each in many]
    assert tally.by_source == {"llm": 300} and tally.outcomes == {("llm", "measured"): 300}


def test_the_newest_evaluations_come_in_the_order_of_their_outcomes() -> None:
    population = Population()
    many = candidates(5)
    for each in many:
        population.insert(each, measured(5.0, each))
    assert [e.candidate for e in population.newest(3)] == many[2:]
    assert population.newest(0) == []
    assert [e.candidate for e in population.newest(9)] == many


def test_proposals_are_counted_as_they_come_as_they_would_be_in_the_whole_ledger() -> None:
    agents = ("initializer", "mutator", "crossover", "baseline")
    ledger = [
        candidate(each.rates, agent=agents[i % 4], round_=i % 5).model_copy(update={"id": f"{i:016x}"})
        for i, each in enumerate(candidates(60))
    ]
    counted = Proposals(ledger[:20])
    for each in ledger[20:]:
        counted.add(each)
    made = [c.provenance for c in ledger if c.provenance.agent != "baseline"]
    assert len(counted) == len(made) == 45
    assert counted.by_agent == Counter(p.agent for p in made) and counted.by_source == {"llm": 45}
    assert counted.made("mutator", 1) == sum((p.agent, p.round) == ("mutator", 1) for p in made)
    assert counted.before(3) == sum(p.round < 3 for p in made)
    mine = {c.id for c in ledger if (c.provenance.agent, c.provenance.round) == ("mutator", 1)}
    assert counted.calls(1)["mutator", 0] == mine
    assert counted.calls(99) == {}
