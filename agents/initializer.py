"""The Initializer: the first population, from what the LLM knows about models of this shape (the paper's Figure 2)."""

from collections.abc import Sequence
from functools import partial

from agents.llm.endpoint import Asks
from agents.operators.edits import MOST_KEPT, Profile, anchors, apply_profile, profile_bounds
from agents.operators.sampling import drawn_profile
from agents.population.call import Call
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.conversation import Question
from agents.prompting.descriptions import about_model
from agents.prompting.prompts import Prompts
from agents.prompting.replies import parse_objects
from agents.prompting.schemas import profile_schema
from agents.prompting.settings import AgentSettings
from agents.proposer import Proposer, lists_question

EDIT_TOKENS = 90


class Initializer:
    """Proposes the first population; random profiles stand in."""

    def __init__(self, chat: Asks, prompts: Prompts, settings: AgentSettings) -> None:
        self._prompts = prompts
        self._settings = settings
        self._proposer = Proposer("initializer", chat, prompts, settings)

    async def propose(self, view: View, count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; returns how many were."""
        return await self._proposer.propose(view, count, submit, self._question, partial(drawn_profile, view=view))

    def _question(self, call: Call) -> Question[Proposal]:
        if self._settings.reply == "lists":
            prompt = self._prompts.fill(
                "initializer_lists", count=call.count, about=about_model(call.view, self._settings.tell)
            )
            return lists_question("initializer_lists", prompt, call.view, ())
        return self._edits_question(call)

    def _edits_question(self, call: Call) -> Question[Proposal]:
        view = call.view
        low, high = profile_bounds(view)
        prompt = self._prompts.fill(
            "initializer_edits",
            count=call.count,
            variant=call.index + view.round,
            anchors=anchors(view),
            low=low,
            high=high,
            most_kept=MOST_KEPT,
            about=about_model(view, self._settings.tell),
        )
        return Question(
            name="initializer_edits",
            prompt=prompt,
            schema=lambda count: profile_schema(view, count),
            parse=lambda text, count: parse_objects(text, Profile, lambda reply: apply_profile(view, reply), count),
            tokens=EDIT_TOKENS,
        )


class BestOfN:
    """The Initializer asked in every round, without feedback: what the LLM knows before anything is measured."""

    def __init__(self, initializer: Initializer) -> None:
        self._initializer = initializer

    async def propose(self, view: View, _parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; returns how many were."""
        return await self._initializer.propose(view, count, submit)
