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
from agents.view import Proposal
from protocol.candidate import AgentName, Provenance

log = structlog.get_logger()


async def draw_siblings(call: Call, draw: Draw, count: int) -> list[Proposal]:
    """`count` of what `draw` makes, no two with one plan and none with a plan that was proposed in an earlier round.

    Fewer where no more are found.
    """
    rng, view = call.rng, call.view
    found: dict[str, Proposal] = {}
    for _ in range(TRIES * count):
        proposal = draw(rng)
        id_ = view.candidate_id(proposal.rates)
        if id_ is not None and not view.was_proposed(id_):
            found.setdefault(id_, proposal)
        if len(found) == count:
            break
        await asyncio.sleep(0)  # others have to get on
    return list(found.values())


async def ranked_in_steps(
    agent: AgentName, call: Call, siblings: Sequence[Proposal], steps: Sequence[SelectionStep]
) -> list[Proposal]:
    """Those of `siblings` that came to the last step, best first by what they have there; what failed is left out.

    A step's windows are decided by the call alone, so what is repeated after a kill looks at the same.
    """
    view = call.view
    assert view.look is not None
    who = Provenance(agent=agent, source="classical", round=view.round, call=call.index)
    of = view.card.dense.windows(view.spec.fitness.seqlen)
    for number, step in enumerate(steps):
        tried = siblings[: step.offspring]
        on_windows = tuple(sorted(random.Random(call.seed(number)).sample(range(of), step.windows)))
        fitness = await view.look(tried, who, on_windows)
        known = [(value, place) for place, value in enumerate(fitness) if value is not None]
        siblings = [tried[place] for _, place in sorted(known)]
        log.info(
            "siblings_ranked",
            round=view.round,
            step=number + 1,
            on_windows=on_windows,
            tried=len(tried),
            ranked=len(siblings),
        )
    return list(siblings)
