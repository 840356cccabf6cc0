"""The request parameters that one endpoint accepts, learned from its refusals: the ladder of structured output. Pure.

"OpenAI-compatible" servers differ: llama.cpp accepts a grammar, some accept `json_schema`, some only `json_object`,
some neither; some refuse `seed`, or expect the token limit under another name. Each refusal takes one step down the
ladder and is remembered. Replies are validated the same way on all rungs.
"""

from dataclasses import dataclass, field
from typing import Literal, cast

from agents.llm.endpoint import Question
from agents.llm.grammar import compact_grammar

Rung = Literal["grammar", "json_schema", "json_object", "text"]
_LADDER: tuple[Rung, ...] = ("grammar", "json_schema", "json_object", "text")
_REFUSED = (400, 422, 500, 501)
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "structured output", "grammar", "schema")
_LENGTH_WORDS = ("context size", "context length", "context window", "maximum context", "too long")
"""Words of errors about a prompt that is too long. Such an error says nothing about the dialect, even if it repeats the
whole request."""


@dataclass
class Dialect:
    """The parameters to send; refusals change them."""

    rung: Rung = "json_schema"
    """The highest rung to use. A schema without a grammar is sent as `json_schema`, whose refusal counts, too."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    left_out: set[str] = field(default_factory=set)
    """Names of the parameters that are not sent, because the model refuses them: `seed`, `temperature`."""

    def body(self, question: Question) -> dict[str, object]:
        """Return the part of the request that differs between endpoints."""
        schema = question.schema
        wanted: dict[str, object] = {"seed": question.seed, "temperature": question.temperature}
        body = {name: value for name, value in wanted.items() if name not in self.left_out}
        body[self.limit_name] = question.max_tokens
        grammar = compact_grammar(schema) if schema is not None and self.rung == "grammar" else None
        if grammar is not None:
            body["grammar"] = grammar
        elif schema is not None and self.rung in ("grammar", "json_schema"):
            described = {"name": question.schema_name, "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        elif schema is not None and self.rung == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def learn(self, status: int, message: str, sent: dict[str, object]) -> bool:
        """Change one parameter after a refusal of `sent`; return False if `message` names none that can be changed."""
        message = message.lower()
        if status not in _REFUSED or any(words in message for words in _LENGTH_WORDS):
            return False
        if self.limit_name in sent and self.limit_name == "max_tokens" and "max_completion_tokens" in message:
            self.limit_name = "max_completion_tokens"
            return True
        if any(word in message for word in _FORMAT_WORDS) and (refused := _rung_of(sent)):
            return self._step_down(refused)
        for name in ("seed", "temperature"):
            if name in sent and name in message:
                self.left_out.add(name)
                return True
        return False

    def learn_silence(self, sent: dict[str, object]) -> bool:
        """Step down after an answer without text if a grammar was sent; return False if no grammar was sent.

        If the chat template itself opens the reasoning, all text that the grammar allows becomes reasoning.
        """
        return "grammar" in sent and self._step_down("grammar")

    def _step_down(self, refused: Rung) -> bool:
        # A concurrent question may have stepped down already. Refusing a rung above the current one changes nothing.
        if _LADDER.index(refused) >= _LADDER.index(self.rung):
            self.rung = _LADDER[_LADDER.index(refused) + 1]
        return True


def _rung_of(sent: dict[str, object]) -> Rung | None:
    """Return the rung of a request; None for plain text."""
    if "grammar" in sent:
        return "grammar"
    wanted = sent.get("response_format")
    return cast(Rung, wanted["type"]) if isinstance(wanted, dict) else None
