"""EvoPress's selection in steps: many siblings are measured on a few windows of the text, the best of them on more.

The windows of a step are drawn anew in each round, and are the same for all siblings. Nothing here decides who is
better in the end: who comes through the last step is a candidate like any other, measured on the whole text.
"""

import asyncio
import random
from collections.abc import Sequence

import structlog

from agents.asking import Call
from agents.offers import TRIES, Draw
from agents.settings import SelectionStep
from agents.view import Proposal, View
from protocol.candidate import AgentName, Provenance

log = structlog.get_logger()


async def draw_siblings(call: Call, draw: Draw, count: int) -> list[Proposal]:
    """`count` of what `draw` makes, no two with one plan and none with a plan that has been measured whole.

    Fewer where no more are found.
    """
    rng, view = call.rng, call.view
    found: dict[str, Proposal] = {}
    for _ in range(TRIES * count):
        proposal = draw(rng)
        id_ = view.candidate_id(proposal.rates)
        if id_ is not None and view.fitness_of(id_) is None:
            found.setdefault(id_, proposal)
        if len(found) == count:
            break
        await asyncio.sleep(0)  # others have to get on
    return list(found.values())


async def ranked_in_steps(
    agent: AgentName, call: Call, siblings: Sequence[Proposal], steps: Sequence[SelectionStep]
) -> list[Proposal]:
    """Those of `siblings` that came to the last step, best first by what they have there; what failed is left out.

    A step's windows are decided by the search's seed and the round, so what is repeated after a kill measures the same.
    """
    for number, step in enumerate(steps):
        windows = _drawn_windows(call, number, step.windows)
        siblings = await _ranked(agent, call.view, siblings[: step.offspring], windows)
        log.info("siblings_ranked", round=call.view.round, step=number + 1, windows=windows, ranked=len(siblings))
    return list(siblings)


def _drawn_windows(call: Call, step: int, count: int) -> tuple[int, ...]:
    return tuple(sorted(random.Random(call.seed(step)).sample(range(call.view.fitness_windows), count)))


async def _ranked(
    agent: AgentName, view: View, siblings: Sequence[Proposal], windows: tuple[int, ...]
) -> list[Proposal]:
    async def tried(proposal: Proposal) -> float | None:
        who = Provenance(agent=agent, source="classical", round=view.round, parents=proposal.parents)
        return await view.look(proposal.rates, who, windows)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(tried(proposal)) for proposal in siblings]
    found = [(task.result(), proposal) for task, proposal in zip(tasks, siblings, strict=True)]
    known = [(fitness, proposal) for fitness, proposal in found if fitness is not None]
    return [proposal for _, proposal in sorted(known, key=lambda pair: pair[0])]
