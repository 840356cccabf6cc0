"""The Initializer: the first population, from what the LLM knows about models of this shape (the paper's Figure 2)."""

from collections.abc import Sequence

from agents.llm.endpoint import ChatClient
from agents.operators.edits import MAX_KEPT, Profile, anchor_layers, apply_profile, profile_bounds
from agents.operators.rules import sample_rule
from agents.operators.sampling import sample_profile
from agents.population.submission import Call
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.descriptions import about_model
from agents.prompting.prompts import Prompt, fill
from agents.prompting.replies import parse_objects
from agents.prompting.rules import INITIAL_IDEAS, examples_of, idea, rules_in_general, rules_prompt
from agents.prompting.schemas import profile_schema
from agents.prompting.settings import AgentSettings
from agents.proposer import Proposer, lists_prompt

EDIT_TOKENS = 90


class Initializer:
    """Proposes the first population. The fallback samples random profiles."""

    def __init__(self, chat: ChatClient, settings: AgentSettings) -> None:
        self._settings = settings
        self._proposer = Proposer("initializer", chat, settings)

    async def propose(self, view: View, count: int, submit: Submit) -> int:
        """Submit candidates until `count` are accepted; return the number accepted."""
        prompts = {"lists": self._lists, "edits": self._edits, "moves": self._edits, "rules": self._rules}
        operator = sample_rule if self._settings.reply == "rules" else sample_profile
        return await self._proposer.propose(view, (), count, submit, prompts[self._settings.reply], operator)

    def _rules(self, call: Call) -> Prompt[Proposal]:
        text = fill(
            "initializer_rules",
            count=call.count,
            idea=idea(call.view, INITIAL_IDEAS, call.index + call.view.round),
            **rules_in_general(call.view),
            examples=examples_of(call.view, call.index + call.view.round),
            lessons=call.view.lessons,
            about=about_model(call.view, self._settings.feedback),
        )
        return rules_prompt("initializer_rules", text, call, ())

    def _lists(self, call: Call) -> Prompt[Proposal]:
        text = fill(
            "initializer_lists",
            count=call.count,
            lessons=call.view.lessons,
            about=about_model(call.view, self._settings.feedback),
        )
        return lists_prompt("initializer_lists", text, call.view, ())

    def _edits(self, call: Call) -> Prompt[Proposal]:
        view = call.view
        low, high = profile_bounds(view)
        text = fill(
            "initializer_edits",
            count=call.count,
            variant=call.index + view.round,
            anchors=anchor_layers(view),
            low=low,
            high=high,
            max_kept=MAX_KEPT,
            lessons=view.lessons,
            about=about_model(view, self._settings.feedback),
        )
        return Prompt(
            name="initializer_edits",
            text=text,
            schema=lambda count: profile_schema(view, count),
            parse=lambda text, count: parse_objects(text, Profile, lambda reply: apply_profile(view, reply), count),
            tokens_per_item=EDIT_TOKENS,
        )


class BestOfN:
    """Asks the Initializer in every round, so that the LLM proposes without seeing any measured candidate."""

    def __init__(self, initializer: Initializer) -> None:
        self._initializer = initializer

    async def propose(self, view: View, _parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Submit candidates until `count` are accepted; return the number accepted."""
        return await self._initializer.propose(view, count, submit)
