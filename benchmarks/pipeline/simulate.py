"""The pipeline of a search as a discrete-event simulation, in which hours take milliseconds."""

from collections.abc import Generator
from random import Random
from typing import Any

import simpy

from benchmarks.pipeline.case import Case, varied
from daemon.search.in_flight import enough

Steps = Generator[simpy.Event, Any, Any]


class Simulation:
    """One search. `busy_share` is the share of their time in which the workers measure."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, self._rng = case, Random(seed)
        self._env = simpy.Environment()
        self._queue: simpy.Store = simpy.Store(self._env)
        self._slots = simpy.Resource(self._env, case.at_once)
        self._daemon = simpy.Resource(self._env, 1)
        self._outcome = self._env.event()
        self._issued = self._measured = 0
        self._chosen_until = -1
        """The question before which the parents of the newest selection are used; -1 before the first selection."""
        self._choosing: simpy.Event | None = None
        self.measuring = 0.0
        for _ in range(case.workers):
            self._env.process(self._work())
        self._env.run(self._env.process(self._search()))
        self.seconds = self._env.now

    @property
    def busy_share(self) -> float:
        """Return the share of the workers' time in which they measured, from the first question to the last outcome."""
        return self.measuring / (self.case.workers * self.seconds)

    def _work(self) -> Steps:
        while True:
            yield self._queue.get()
            with self._daemon.request() as turn:
                yield turn
                yield self._env.timeout(self.case.overhead)
            seconds = varied(self.case.evaluation, self._rng)
            yield self._env.timeout(seconds)
            self.measuring += seconds
            self._measured += 1
            self._outcome.succeed()
            self._outcome = self._env.event()

    def _answer(self) -> simpy.Event:
        return self._env.process(self._answered())

    def _answered(self) -> Steps:
        with self._slots.request() as slot:
            yield slot
            yield self._env.timeout(varied(self.case.answer, self._rng))

    def _proposal(self) -> simpy.Event:
        return self._env.process(self._proposed())

    def _proposed(self) -> Steps:
        yield self._answer()
        while self._rng.random() < self.case.refused:
            yield self._answer()

    def _search(self) -> Steps:
        yield from self._asked_together(self.case.population)
        if self.case.mode == "generational":
            while self._issued < self.case.candidates:
                yield from self._until(lambda: self._measured == self._issued)
                yield self._answer()  # the Selector
                yield from self._asked_together(min(self.case.offspring, self.case.candidates - self._issued))
        else:
            yield from self._steady_state()
        yield from self._until(lambda: self._measured == self._issued)

    def _asked_together(self, count: int) -> Steps:
        """Ask `count` questions at once. Their candidates enter the queue in the order of the questions."""
        for proposal in [self._proposal() for _ in range(count)]:
            yield proposal
            self._issue()

    def _issue(self) -> None:
        self._issued += 1
        self._queue.put(self._issued)

    def _until(self, reached: Any) -> Steps:
        while not reached():
            yield self._outcome

    def _steady_state(self) -> Steps:
        """Ask as daemon/search/modes.py does, with the limits that the daemon finds when it knows all times."""
        case = self.case
        together = case.together
        limit = enough(case.workers, case.answer, case.evaluation, case.at_once, together)
        yield from self._until(lambda: self._measured >= 2)
        asking: dict[simpy.Process, int] = {}
        begun = 0
        while asking or self._issued < case.candidates:
            asked_for = sum(asking.values())
            left, under_way = case.candidates - self._issued - asked_for, self._issued - self._measured + asked_for
            count = max(1, min(together, left // 4))
            if left > 0 and under_way + count <= limit and len(asking) < case.at_once:
                begun += 1
                asking[self._env.process(self._turn(begun, count, max(1, limit // count)))] = count
            else:
                yield simpy.AnyOf(self._env, [self._outcome, *asking])
                asking = {question: count for question, count in asking.items() if question.is_alive}

    def _turn(self, turn: int, count: int, limit: int) -> Steps:
        if self._chosen_until < 0 and self._choosing is not None:
            yield self._choosing
        if self._chosen_until < 0 or (turn >= self._chosen_until and self._choosing is None):
            self._choosing = self._env.event()
            yield self._answer()  # the Selector
            self._chosen_until = turn + limit
            self._choosing.succeed()
            self._choosing = None
        yield self._answer()
        missing = count
        while missing:  # the LLM is asked again for those that are refused
            made = sum(self._rng.random() >= self.case.refused for _ in range(missing))
            for _ in range(made):
                self._issue()
            missing -= made
            if missing:
                yield self._answer()
