"""The Mutator: offspring of one parent each (the paper's Figure 3)."""

from collections.abc import Sequence
from functools import partial

from agents.asking import Asks, Call, Question
from agents.draws import drawn_mutation
from agents.edits import MOST_CHANGES, STEPS, Mutation, apply_mutation, mutation_schema
from agents.lists import lists_question
from agents.prompt import Prompts
from agents.proposing import Proposer
from agents.replies import parse_objects
from agents.settings import AgentSettings
from agents.view import Member, Proposal, Submit, View
from agents.words import about_model, numbered_lists, numbered_profiles

EDIT_TOKENS = 90
SHOWN = 3
"""Parents that one call for edits is shown: more only lengthen the prompt."""


class Mutator:
    """Proposes mutations of the parents; shifts of rate between units stand in."""

    def __init__(self, chat: Asks, prompts: Prompts, settings: AgentSettings) -> None:
        self._prompts = prompts
        self._settings = settings
        self._proposer = Proposer("mutator", chat, prompts, settings)

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` mutations of `parents` accepted; returns how many were."""
        if not parents:
            return 0

        def question(call: Call) -> Question[Proposal]:
            return self._lists(call, parents) if self._settings.reply == "lists" else self._edits(call, parents)

        return await self._proposer.propose(view, count, submit, question, partial(drawn_mutation, parents=parents))

    def _lists(self, call: Call, parents: Sequence[Member]) -> Question[Proposal]:
        prompt = self._prompts.fill(
            "mutator_lists", count=call.count, members=numbered_lists(call.view, parents), about=about_model(call.view)
        )
        return lists_question("mutator_lists", prompt, call.view, parents)

    def _edits(self, call: Call, parents: Sequence[Member]) -> Question[Proposal]:
        view = call.view
        shown = call.some_of(parents, SHOWN)
        prompt = self._prompts.fill(
            "mutator_edits",
            count=call.count,
            variant=call.index + view.round,
            members=numbered_profiles(view, shown),
            most_changes=MOST_CHANGES,
            steps=STEPS,
            about=about_model(view),
        )
        return Question(
            name="mutator_edits",
            prompt=prompt,
            schema=lambda count: mutation_schema(view, len(shown), count),
            parse=lambda text, count: parse_objects(
                text, Mutation, lambda reply: apply_mutation(view, shown, reply), count
            ),
            tokens=EDIT_TOKENS,
        )
