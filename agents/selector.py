"""The Selector: which members of the population become parents, and what makes their offspring."""

from structlog.contextvars import bound_contextvars

from agents.llm.endpoint import Answer, ChatClient
from agents.operators.genetic import tournament
from agents.operators.strategy import possible_steps, step_records
from agents.population.submission import Call
from agents.population.view import Member, Selection, View
from agents.prompting.conversation import Asker
from agents.prompting.descriptions import about_model, numbered_sections
from agents.prompting.prompts import Prompt, fill
from agents.prompting.replies import Parsed, parse_objects
from agents.prompting.schemas import Choice, apply_choice, choice_schema
from agents.prompting.settings import AgentSettings

TOKENS_PER_PARENT = 5
SHOWN = 40
"""Maximum number of members that the LLM is shown, best first. The other members cannot be chosen."""


class Selector:
    """Asks the LLM for the numbers of the parents, with every setting of `reply`. The fallback is a tournament.

    If other agents can make rules, moves or plans, it also asks which of them make the round's offspring.
    """

    def __init__(self, chat: ChatClient, settings: AgentSettings, *, chooses_step: bool = False) -> None:
        self._settings = settings
        self._chooses_step = chooses_step
        self._asker = Asker(chat, settings)

    async def select(self, view: View, count: int) -> Selection:
        """Return up to `count` parents, best first.

        At most half of the population is selected, but at least two members. Taking all would be no selection.
        """
        population = view.population[:SHOWN]
        wanted = min(count, max(2, len(population) // 2), len(population))
        call = Call("selector", view, 0, wanted)
        chosen: list[Selection] = []

        async def take(selection: Selection, _: Answer) -> str | None:
            chosen.append(selection)
            return None

        if wanted >= 2:
            with bound_contextvars(agent=call.agent, round=view.round):
                await self._asker.ask(call, self._prompt(view, population, wanted), 1, take)
        if chosen:
            return chosen[0]
        return Selection(tournament(call.rng, population, wanted), "fallback")

    def _prompt(self, view: View, population: tuple[Member, ...], wanted: int) -> Prompt[Selection]:
        records = step_records(view)
        steps = possible_steps(view) if self._chooses_step else ()

        def apply(reply: Choice) -> Selection:
            step = next((step for step in steps if step == reply.step), None)
            return Selection(apply_choice(population, wanted, reply), "llm", step)

        def parse(text: str, _: int) -> Parsed[Selection]:
            return parse_objects(text, Choice, apply, 1)

        return Prompt(
            name="selector",
            text=fill(
                "selector",
                wanted=wanted,
                about=about_model(view, self._settings.feedback),
                members=numbered_sections(view, population),
                steps={step: records[step] for step in steps},
            ),
            schema=lambda _: choice_schema(len(population), wanted, steps),
            parse=parse,
            tokens_per_item=TOKENS_PER_PARENT * wanted,
        )
