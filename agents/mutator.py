"""The Mutator: offspring of one parent each (the paper's Figure 3)."""

from collections.abc import Sequence
from functools import partial

from agents.llm.endpoint import ChatClient
from agents.operators.edits import MAX_CHANGES, STEPS, Mutation, apply_mutation
from agents.operators.moves import apply_moves, move_menu
from agents.operators.rules import at_rate, rule_of, ruled_members
from agents.operators.sampling import (
    MAX_MOVES,
    RANKED_MOVES,
    sample_move_parent,
    sample_mutation,
    sample_ranked_moves,
)
from agents.operators.strategy import next_step, sample_mutation_step
from agents.operators.trust_region import sample_plan
from agents.population.submission import Call, Operator
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.descriptions import (
    about_model,
    fitness_in_words,
    moves_in_words,
    numbered_lists,
    numbered_profiles,
    prediction_in_words,
)
from agents.prompting.feedback import Feedback, feedback_on
from agents.prompting.prompts import Prompt, fill
from agents.prompting.replies import parse_objects
from agents.prompting.rules import (
    CHANGES,
    SHOWN_RULES,
    effects_of_rules,
    idea,
    rules_in_general,
    rules_in_words,
    rules_prompt,
    where_wrong,
)
from agents.prompting.schemas import MoveChoice, moves_schema, mutation_schema, pick
from agents.prompting.settings import AgentSettings
from agents.proposer import Proposer, lists_prompt

EDIT_TOKENS = 90
MOVE_TOKENS = 30
SHOWN = 3
"""Maximum number of parents shown in a prompt for `edits`. Showing more would only lengthen the prompt."""


class Mutator:
    """Proposes mutations of the parents. The fallback shifts rate between units."""

    def __init__(self, chat: ChatClient, settings: AgentSettings) -> None:
        self._settings = settings
        self._proposer = Proposer("mutator", chat, settings)

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Submit mutations of `parents` until `count` are accepted; return the number accepted."""
        if not parents:
            return 0

        prompts = {"lists": self._lists, "edits": self._edits, "moves": self._moves, "rules": self._rules}
        make_prompt = partial(
            prompts[self._settings.reply], parents=parents, feedback=feedback_on(view, self._settings.feedback)
        )
        operators: dict[str, Operator] = {"moves": sample_ranked_moves, "rules": sample_mutation_step}
        operator = operators.get(self._settings.reply, sample_mutation)
        partner = sample_plan if self._settings.reply == "moves" else operator
        return await self._proposer.propose(view, parents, count, submit, make_prompt, operator, partner)

    def _lists(self, call: Call, parents: Sequence[Member], feedback: Feedback) -> Prompt[Proposal]:
        text = fill(
            "mutator_lists",
            count=call.count,
            members=numbered_lists(call.view, parents),
            feedback=feedback,
            about=about_model(call.view, self._settings.feedback),
        )
        return lists_prompt("mutator_lists", text, call.view, parents)

    def _moves(self, call: Call, parents: Sequence[Member], feedback: Feedback) -> Prompt[Proposal]:
        view, rng = call.view, call.rng
        parent = sample_move_parent(rng, view, parents)
        moves = move_menu(view, parent, rng, RANKED_MOVES)
        if not moves:  # every unit is at a bound
            return self._edits(call, parents, feedback)
        text = fill(
            "mutator_moves",
            count=call.count,
            variant=call.index + view.round,
            fitness=fitness_in_words(view, parent),
            feedback=feedback,
            moves=moves_in_words(view, parent, moves),
            max_moves=min(MAX_MOVES, len(moves)),
            about=about_model(view, self._settings.feedback),
        )

        def apply(reply: MoveChoice) -> Proposal:
            return apply_moves(parent, pick(moves, reply.moves, MAX_MOVES, "move"))

        return Prompt(
            name="mutator_moves",
            text=text,
            schema=lambda count: moves_schema(len(moves), MAX_MOVES, count),
            parse=lambda text, count: parse_objects(text, MoveChoice, apply, count),
            tokens_per_item=MOVE_TOKENS,
            preview=lambda draft: prediction_in_words(view, draft.rates),
        )

    def _rules(self, call: Call, parents: Sequence[Member], feedback: Feedback) -> Prompt[Proposal] | Operator:
        view = call.view
        step = next_step(view, call.generator("step"))
        if step == "plans":
            return sample_plan
        if step == "moves":
            return self._moves(call, parents, feedback)
        ruled = ruled_members(view, parents)
        shown = call.sample_members(ruled[:SHOWN_RULES], 1)[0]
        text = fill(
            "mutator_rules",
            count=call.count,
            idea=idea(view, CHANGES, call.index + view.round),
            **rules_in_general(view),
            fitness=fitness_in_words(view, shown),
            rule=at_rate(view, rule) if (rule := rule_of(shown)) else "",
            others=rules_in_words(view, [member for member in ruled[: SHOWN_RULES + 1] if member is not shown]),
            wrong=where_wrong(view, shown),
            effects=effects_of_rules(view) if "effects" in self._settings.feedback else [],
            about=about_model(view, self._settings.feedback),
        )
        return rules_prompt("mutator_rules", text, call, [shown])

    def _edits(self, call: Call, parents: Sequence[Member], feedback: Feedback) -> Prompt[Proposal]:
        view = call.view
        shown = call.sample_members(parents, SHOWN)
        text = fill(
            "mutator_edits",
            count=call.count,
            variant=call.index + view.round,
            members=numbered_profiles(view, shown),
            feedback=feedback,
            max_changes=MAX_CHANGES,
            steps=STEPS,
            about=about_model(view, self._settings.feedback),
        )
        return Prompt(
            name="mutator_edits",
            text=text,
            schema=lambda count: mutation_schema(view, len(shown), count),
            parse=lambda text, count: parse_objects(
                text, Mutation, lambda reply: apply_mutation(view, shown, reply), count
            ),
            tokens_per_item=EDIT_TOKENS,
        )
