"""The Mutator: offspring of one parent each (the paper's Figure 3)."""

from collections.abc import Sequence
from functools import partial

from agents.llm.endpoint import Asks
from agents.operators.edits import MOST_CHANGES, STEPS, Mutation, apply_mutation
from agents.operators.sampling import MOST_TRADES, RANKED_TRADES, RankedTrades, drawn_mutation, good_one
from agents.operators.trades import menu, traded
from agents.population.call import Call
from agents.population.submission import Draw
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.conversation import Question
from agents.prompting.descriptions import (
    about_model,
    fitness_in_words,
    numbered_lists,
    numbered_profiles,
    trades_in_words,
)
from agents.prompting.feedback import Telling, telling
from agents.prompting.prompts import Prompts
from agents.prompting.replies import parse_objects
from agents.prompting.schemas import TradeChoice, chosen_of, mutation_schema, trades_schema
from agents.prompting.settings import AgentSettings
from agents.proposer import Proposer, lists_question

EDIT_TOKENS = 90
TRADE_TOKENS = 30
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

        told = telling(view, self._settings.tell)
        if self._settings.reply == "trades":
            question = partial(self._trades, parents=parents, told=told)
            fallback: Draw = RankedTrades(view, parents)
        else:
            question = partial(
                self._lists if self._settings.reply == "lists" else self._edits, parents=parents, told=told
            )
            fallback = partial(drawn_mutation, parents=parents)
        return await self._proposer.propose(view, count, submit, question, fallback)

    def _lists(self, call: Call, parents: Sequence[Member], told: Telling) -> Question[Proposal]:
        prompt = self._prompts.fill(
            "mutator_lists",
            count=call.count,
            members=numbered_lists(call.view, parents),
            told=told,
            about=about_model(call.view, self._settings.tell),
        )
        return lists_question("mutator_lists", prompt, call.view, parents)

    def _trades(self, call: Call, parents: Sequence[Member], told: Telling) -> Question[Proposal]:
        view, rng = call.view, call.rng
        parent = good_one(rng, view, parents)
        trades = menu(view, parent, rng, RANKED_TRADES)
        if not trades:  # every unit is at a bound
            return self._edits(call, parents, told)
        prompt = self._prompts.fill(
            "mutator_trades",
            count=call.count,
            variant=call.index + view.round,
            fitness=fitness_in_words(view, parent),
            told=told,
            trades=trades_in_words(view, parent, trades),
            most=min(MOST_TRADES, len(trades)),
            about=about_model(view, self._settings.tell),
        )

        def apply(reply: TradeChoice) -> Proposal:
            return traded(parent, chosen_of(trades, reply.trades, MOST_TRADES, "trade"))

        return Question(
            name="mutator_trades",
            prompt=prompt,
            schema=lambda count: trades_schema(len(trades), MOST_TRADES, count),
            parse=lambda text, count: parse_objects(text, TradeChoice, apply, count),
            tokens=TRADE_TOKENS,
        )

    def _edits(self, call: Call, parents: Sequence[Member], told: Telling) -> Question[Proposal]:
        view = call.view
        shown = call.some_of(parents, SHOWN)
        prompt = self._prompts.fill(
            "mutator_edits",
            count=call.count,
            variant=call.index + view.round,
            members=numbered_profiles(view, shown),
            told=told,
            most_changes=MOST_CHANGES,
            steps=STEPS,
            about=about_model(view, self._settings.tell),
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
