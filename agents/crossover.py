"""The Crossover: offspring of two parents each (the paper's Figure 3)."""

from collections.abc import Sequence
from functools import partial

from agents.llm.endpoint import ChatClient
from agents.operators.edits import Mix, apply_mix, mix_bounds
from agents.operators.mixes import mix_menu
from agents.operators.rules import ruled_members
from agents.operators.sampling import RANKED_MIXES, sample_mix, sample_ranked_mix
from agents.operators.strategy import next_step, sample_crossover_step
from agents.operators.trust_region import sample_plan
from agents.population.submission import Call, Operator
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.descriptions import about_model, mixes_in_words, numbered_lists, numbered_profiles
from agents.prompting.prompts import Prompt, fill
from agents.prompting.replies import parse_objects
from agents.prompting.rules import SHOWN_RULES, rules_in_general, rules_in_words, rules_prompt
from agents.prompting.schemas import MixChoice, mix_schema, mixes_schema, pick
from agents.prompting.settings import AgentSettings
from agents.proposer import Proposer, lists_prompt

EDIT_TOKENS = 60
MIX_TOKENS = 20
SHOWN = 3
"""Maximum number of parents shown in a prompt for `edits`. Showing more would only lengthen the prompt."""


class Crossover:
    """Proposes mixes of two parents. The fallback takes a range of units from a second parent."""

    def __init__(self, chat: ChatClient, settings: AgentSettings) -> None:
        self._settings = settings
        self._proposer = Proposer("crossover", chat, settings)

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Submit crossovers until `count` are accepted. Return the number accepted: 0 for fewer than two parents."""
        if len(parents) < 2:
            return 0

        prompts = {"lists": self._lists, "edits": self._edits, "moves": self._mixes, "rules": self._rules}
        make_prompt = partial(prompts[self._settings.reply], parents=parents)
        operators: dict[str, Operator] = {"moves": sample_ranked_mix, "rules": sample_crossover_step}
        operator = operators.get(self._settings.reply, sample_mix)
        partner = sample_plan if self._settings.reply == "moves" else operator
        return await self._proposer.propose(view, parents, count, submit, make_prompt, operator, partner)

    def _lists(self, call: Call, parents: Sequence[Member]) -> Prompt[Proposal]:
        text = fill(
            "crossover_lists",
            count=call.count,
            members=numbered_lists(call.view, parents),
            about=about_model(call.view, self._settings.feedback),
        )
        return lists_prompt("crossover_lists", text, call.view, parents)

    def _mixes(self, call: Call, parents: Sequence[Member]) -> Prompt[Proposal]:
        view = call.view
        mixes = mix_menu(view, parents, call.rng, max(RANKED_MIXES, 2 * call.count))
        if not mixes:  # the parents are all alike
            return self._edits(call, parents)
        text = fill(
            "crossover_moves",
            count=call.count,
            mixes=mixes_in_words(view, parents, mixes),
            about=about_model(view, self._settings.feedback),
        )

        def apply(reply: MixChoice) -> Proposal:
            return pick(mixes, [reply.mix], 1, "mix")[0].proposal

        return Prompt(
            name="crossover_moves",
            text=text,
            schema=lambda count: mixes_schema(len(mixes), count),
            parse=lambda text, count: parse_objects(text, MixChoice, apply, count),
            tokens_per_item=MIX_TOKENS,
        )

    def _rules(self, call: Call, parents: Sequence[Member]) -> Prompt[Proposal] | Operator:
        view = call.view
        ruled, step = ruled_members(view, parents)[:SHOWN_RULES], next_step(view, call.generator("step"))
        if step == "plans":
            return sample_plan
        if len(ruled) < 2 or step == "moves":
            return self._mixes(call, parents)
        text = fill(
            "crossover_rules",
            count=call.count,
            **rules_in_general(view),
            rules=rules_in_words(view, ruled),
            about=about_model(view, self._settings.feedback),
        )
        return rules_prompt("crossover_rules", text, call, ruled)

    def _edits(self, call: Call, parents: Sequence[Member]) -> Prompt[Proposal]:
        view = call.view
        shown = call.sample_members(parents, SHOWN)
        text = fill(
            "crossover_edits",
            count=call.count,
            variant=call.index + view.round,
            bounds=mix_bounds(view),
            members=numbered_profiles(view, shown),
            about=about_model(view, self._settings.feedback),
        )
        return Prompt(
            name="crossover_edits",
            text=text,
            schema=lambda count: mix_schema(view, len(shown), count),
            parse=lambda text, count: parse_objects(text, Mix, lambda reply: apply_mix(view, shown, reply), count),
            tokens_per_item=EDIT_TOKENS,
        )
