"""A scripted LLM that answers any question with a random value of the question's own JSON schema."""

import json
import random
import re
import time
from typing import Any

from agents.llm.endpoint import Answer, Question


def value_of(schema: dict[str, Any], rng: random.Random) -> Any:
    """Return a random value that the schema allows."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    match schema["type"]:
        case "object":
            return {name: value_of(part, rng) for name, part in schema["properties"].items()}
        case "array":
            length = rng.randint(schema.get("minItems", 1), schema.get("maxItems", 3))
            return [value_of(schema["items"], rng) for _ in range(length)]
        case "integer":
            return rng.randint(schema["minimum"], schema["maximum"])
        case "number":
            return round(rng.uniform(schema.get("minimum", 0.0), schema.get("maximum", 1.0)), 5)
        case "string":
            return _formula(schema["pattern"], rng)
        case other:
            raise AssertionError(f"no value for type {other!r}")


def _formula(pattern: str, rng: random.Random) -> str:
    """Return a rule that the pattern of rules allows; the first group of names after a sign is that of the features."""
    names = re.search(r"\(([a-z_|]+)\)", pattern[pattern.index("(-)?") :])
    assert names is not None
    begin = re.match(r"\^([a-z_]+)", pattern)
    assert begin is not None
    terms = [f" {rng.choice('+-')} 0.0{rng.randint(1, 9)}*{rng.choice(names[1].split('|'))}" for _ in range(3)]
    text = begin[1] + "".join(terms)
    assert re.search(pattern, text)
    return text


def answer(body: dict[str, Any], *, after: float = 0) -> str:
    """Answer a request's body by its schema and its seed. An LLM takes some seconds: `after`."""
    time.sleep(after)
    return json.dumps(value_of(body["response_format"]["json_schema"]["schema"], random.Random(body["seed"])))


class SchemaChat:
    """Answers at once, deterministically by seed, and counts its requests."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        """For each question, in order: agent, round, call and attempt."""

    @property
    def asked(self) -> int:
        return len(self.labels)

    async def ask(self, question: Question) -> Answer:
        self.labels.append(question.label)
        assert question.schema is not None
        text = json.dumps(value_of(question.schema, random.Random(question.seed)))
        return Answer(text, "scripted", 100, 20, 0.0, "stop")
