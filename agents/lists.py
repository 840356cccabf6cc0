"""The `lists` replies: whole configurations, as in the paper's Figures 2 and 3. Pure."""

from collections.abc import Sequence

from agents.population.view import Member, Proposal, View
from agents.prompting.conversation import Question
from agents.prompting.replies import Parsed, parse_lists

TOKENS_PER_RATE = 9


def lists_question(name: str, prompt: str, view: View, shown: Sequence[Member]) -> Question[Proposal]:
    """A question whose answer is lists of rates, made from all the members `shown`."""
    units = view.units
    parents = tuple(member.candidate.id for member in shown)

    def parse(text: str, count: int) -> Parsed[Proposal]:
        parsed = parse_lists(text, units, view.spec.rate, count)
        return Parsed(tuple(Proposal(rates, parents) for rates in parsed.good), parsed.names, parsed.problems)

    return Question(name, prompt, lambda count: lists_schema(len(units), count), parse, TOKENS_PER_RATE * len(units))


def lists_schema(units: int, count: int) -> dict[str, object]:
    """For `count` configurations of so many units' rates."""
    rate = {"type": "number", "minimum": 0, "maximum": 1}
    rates = {"type": "array", "items": rate, "minItems": units, "maxItems": units}
    lists = {"type": "array", "items": rates, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {"configurations": lists},
        "required": ["configurations"],
        "additionalProperties": False,
    }
