"""What one endpoint's model accepts, learnt from its refusals: the ladder of structured output. Pure.

"OpenAI-compatible" means something else to every server: llama.cpp's takes a grammar, some know `json_schema`, some
only `json_object`, some neither; some refuse `seed`, or want the token limit under another name. Each refusal takes one
step down and is remembered; the validator of replies guards all rungs alike.
"""

from dataclasses import dataclass, field
from typing import Literal, cast

from agents.llm.grammar import compact_grammar

Rung = Literal["grammar", "json_schema", "json_object", "text"]
_LADDER: tuple[Rung, ...] = ("grammar", "json_schema", "json_object", "text")
_REFUSED = (400, 422, 500, 501)
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "structured output", "grammar", "schema")
_LENGTH_WORDS = ("context size", "context length", "context window", "maximum context", "too long")
"""A prompt that is too long is no matter of dialect, even where the error repeats the whole request."""


@dataclass
class Dialect:
    """What is sent, until a refusal says otherwise."""

    rung: Rung = "json_schema"
    """The highest that is tried. What no grammar can say goes as a schema, and a refusal of that counts for all."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    left_out: set[str] = field(default_factory=set)
    """Of `seed` and `temperature`, those the model refuses."""

    def body(
        self, schema: dict[str, object] | None, schema_name: str, seed: int, temperature: float, max_tokens: int
    ) -> dict[str, object]:
        """The part of the request that differs between endpoints."""
        wanted: dict[str, object] = {"seed": seed, "temperature": temperature}
        body = {name: value for name, value in wanted.items() if name not in self.left_out}
        body[self.limit_name] = max_tokens
        grammar = compact_grammar(schema) if schema is not None and self.rung == "grammar" else None
        if grammar is not None:
            body["grammar"] = grammar
        elif schema is not None and self.rung in ("grammar", "json_schema"):
            described = {"name": schema_name, "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        elif schema is not None and self.rung == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def learn(self, status: int, message: str, sent: dict[str, object]) -> bool:
        """Take one step for a refusal of what was `sent`; False where it names nothing that can be left out."""
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
        """Take a step for an answer without text where a grammar was sent; False where none was.

        A chat template that begins the reasoning itself makes all that the grammar lets through reasoning, every time.
        """
        return "grammar" in sent and self._step_down("grammar")

    def _step_down(self, refused: Rung) -> bool:
        # A concurrent question may have learnt this already: only what is tried now is given up, and what is above it.
        if _LADDER.index(refused) >= _LADDER.index(self.rung):
            self.rung = _LADDER[_LADDER.index(refused) + 1]
        return True


def _rung_of(sent: dict[str, object]) -> Rung | None:
    """Where on the ladder that was; None on the ground, where there is nothing to refuse."""
    if "grammar" in sent:
        return "grammar"
    wanted = sent.get("response_format")
    return cast(Rung, wanted["type"]) if isinstance(wanted, dict) else None
