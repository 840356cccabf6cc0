"""The Crossover: offspring of two parents each (the paper's Figure 3)."""

from collections.abc import Sequence
from functools import partial

from agents.llm.endpoint import Asks
from agents.operators.edits import Mix, apply_mix, mix_bounds
from agents.operators.mixes import mix_menu
from agents.operators.sampling import RANKED_MIXES, drawn_mix, drawn_ranked_mix
from agents.population.call import Call
from agents.population.submission import Draw
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.conversation import Question
from agents.prompting.descriptions import about_model, mixes_in_words, numbered_lists, numbered_profiles
from agents.prompting.prompts import Prompts
from agents.prompting.replies import parse_objects
from agents.prompting.schemas import MixChoice, chosen_of, mix_schema, mixes_schema
from agents.prompting.settings import AgentSettings
from agents.proposer import Proposer, lists_question

EDIT_TOKENS = 60
MIX_TOKENS = 20
SHOWN = 3
"""Parents that one call for edits is shown: more only lengthen the prompt."""


class Crossover:
    """Proposes mixes of two parents; a range of units taken from a second parent stands in."""

    def __init__(self, chat: Asks, prompts: Prompts, settings: AgentSettings) -> None:
        self._prompts = prompts
        self._settings = settings
        self._proposer = Proposer("crossover", chat, prompts, settings)

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` crossovers of `parents` accepted; returns how many were. Fewer than two parents have none."""
        if len(parents) < 2:
            return 0

        if self._settings.reply == "trades":
            question = partial(self._mixes, parents=parents)
            fallback: Draw = partial(drawn_ranked_mix, view=view, parents=parents)
        else:
            question = partial(self._lists if self._settings.reply == "lists" else self._edits, parents=parents)
            fallback = partial(drawn_mix, parents=parents)
        return await self._proposer.propose(view, count, submit, question, fallback)

    def _lists(self, call: Call, parents: Sequence[Member]) -> Question[Proposal]:
        prompt = self._prompts.fill(
            "crossover_lists",
            count=call.count,
            members=numbered_lists(call.view, parents),
            about=about_model(call.view, self._settings.tell),
        )
        return lists_question("crossover_lists", prompt, call.view, parents)

    def _mixes(self, call: Call, parents: Sequence[Member]) -> Question[Proposal]:
        view = call.view
        mixes = mix_menu(view, parents, call.rng, max(RANKED_MIXES, 2 * call.count))
        if not mixes:  # the parents are all alike
            return self._edits(call, parents)
        prompt = self._prompts.fill(
            "crossover_trades",
            count=call.count,
            mixes=mixes_in_words(view, parents, mixes),
            about=about_model(view, self._settings.tell),
        )

        def apply(reply: MixChoice) -> Proposal:
            return chosen_of(mixes, [reply.mix], 1, "mix")[0].proposal

        return Question(
            name="crossover_trades",
            prompt=prompt,
            schema=lambda count: mixes_schema(len(mixes), count),
            parse=lambda text, count: parse_objects(text, MixChoice, apply, count),
            tokens=MIX_TOKENS,
        )

    def _edits(self, call: Call, parents: Sequence[Member]) -> Question[Proposal]:
        view = call.view
        shown = call.some_of(parents, SHOWN)
        prompt = self._prompts.fill(
            "crossover_edits",
            count=call.count,
            variant=call.index + view.round,
            bounds=mix_bounds(view),
            members=numbered_profiles(view, shown),
            about=about_model(view, self._settings.tell),
        )
        return Question(
            name="crossover_edits",
            prompt=prompt,
            schema=lambda count: mix_schema(view, len(shown), count),
            parse=lambda text, count: parse_objects(text, Mix, lambda reply: apply_mix(view, shown, reply), count),
            tokens=EDIT_TOKENS,
        )
