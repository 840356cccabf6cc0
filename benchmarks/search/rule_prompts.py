"""Which parts of the prompt for a first rule matter? Asks for rules without one part after the other, and measures all.

    python -m benchmarks.search.rule_prompts --gguf qwen.gguf --fitness VALID.txt --out DIR

Every variant of the prompt gets the same number of questions, with the same seeds. Beside them stand as many random
rules, with which genetic programming begins. No number is tuned. At block granularity, with least squares.

Each measurement is saved when it is finished, so the same command resumes; replies are asked for anew.

Exit code 2: invalid input.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agents.initializer import Initializer
from agents.llm.chat import Chat
from agents.llm.endpoint import Answer, Question
from agents.operators.rules import beginning, examples, random_rule, usable_features
from agents.population.view import Accepted
from agents.prompting.settings import AgentSettings
from benchmarks.output_folder import lock_folder
from benchmarks.search.rules import Case
from daemon.launch.llm import make_endpoints
from daemon.local.llm_server import find_gguf
from daemon.local.services import local_llm
from daemon.settings.settings import Settings
from daemon.settings.target import check_text
from gpu_worker.measuring.half_precision import products_in_float32
from protocol.errors import SelfPrunerError, UsageError
from protocol.plans.candidate import Provenance
from protocol.plans.rule import Rule
from protocol.runtime.files import write_atomically

CUTS: dict[str, tuple[str, str]] = {
    "without the examples": (r"^Examples: .*\n", ""),
    "without the idea": (r" Idea for this time: [^\n]*", ""),
    "without what features mean": (r"^(- \w+): .*$", r"\1"),
    "without the model": (r"\ATarget: .*\n(Most fragile: .*\n)?", ""),
}
"""What is cut from the prompt: a pattern and what replaces it."""
WHOLE, NO_PATTERN, RANDOM = "the whole prompt", "without the reply's pattern", "random rules"


class CutChat:
    """Asks an LLM without one part of the prompt."""

    def __init__(self, chat: Chat, variant: str) -> None:
        self._chat, self._variant = chat, variant

    async def ask(self, question: Question) -> Answer:
        """Return the answer to the shorter question."""
        if self._variant == NO_PATTERN:
            return await self._chat.ask(replace(question, schema=_without_patterns(question.schema)))
        if self._variant == WHOLE:
            return await self._chat.ask(question)
        pattern, new = CUTS[self._variant]
        messages = [dict(message) for message in question.messages]
        prompt = next(message for message in messages if message["role"] == "user")
        prompt["content"], cut = re.subn(pattern, new, prompt["content"], flags=re.MULTILINE)
        assert cut, f"the prompt has nothing to cut {self._variant}"
        return await self._chat.ask(replace(question, messages=messages))


def _without_patterns(schema: Any) -> Any:
    """Return the schema without the patterns of its texts."""
    if isinstance(schema, dict):
        return {key: _without_patterns(value) for key, value in schema.items() if key != "pattern"}
    return [_without_patterns(each) for each in schema] if isinstance(schema, list) else schema


async def ask_all(case: Case, gguf: str, count: int, folder: Path) -> dict[str, list[str | None]]:
    """Return the rules that the LLM wrote to each variant of the prompt; None for each that it failed to write."""
    target = {"model": case.spec.model, "rate": case.spec.rate}
    settings = Settings.model_validate({"target": target, "local_llm": {"gguf": gguf}, "run": {"folder": str(folder)}})
    settings.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str | None]] = {}
    async with local_llm(settings) as llm, Chat(make_endpoints([llm.endpoint]), settings.llm) as chat:
        await chat.wait_ready()
        for variant in track((WHOLE, *CUTS, NO_PATTERN), "asking", console=Console(stderr=True)):
            rules: list[str | None] = []

            async def submit(_rates: Sequence[float], origin: Provenance, rules: list[str | None] = rules) -> Accepted:
                rules.append(origin.rule if origin.source == "llm" else None)
                return Accepted(str(len(rules)))

            initializer = Initializer(CutChat(chat, variant), AgentSettings(reply="rules", max_tokens=300))
            await initializer.propose(case.view, count, submit)
            found[variant] = rules
    return found


def show(case: Case, rules: dict[str, list[str | None]]) -> None:
    """Measure all rules and print a row for each variant."""
    begun = beginning(usable_features(case.view))
    start = case.of_rule(Rule.parse(begun))
    shown = [Rule.parse(text) for text in examples(case.view)]
    forms = {_form(rule) for rule in shown}
    table = Table(title=f"{case.name}: first rules of an LLM, not tuned; {begun} alone has {start:.4f}")
    for name in (
        "",
        "rules",
        "distinct",
        "an example",
        "… with other numbers",
        "best",
        "median",
        f"better than {begun}",
    ):
        table.add_column(name, justify="right" if name else "left")
    for variant, texts in rules.items():
        read = [Rule.parse(text) for text in texts if text is not None]
        if not read:
            table.add_row(variant, f"0 of {len(texts)}")
            continue
        measured = [case.of_rule(rule) for rule in track(read, variant, console=Console(stderr=True))]
        table.add_row(
            variant,
            f"{len(read)} of {len(texts)}",
            str(len(set(read))),
            str(sum(rule in shown for rule in read)),
            str(sum(rule not in shown and _form(rule) in forms for rule in read)),
            f"{min(measured):.4f}",
            f"{statistics.median(measured):.4f}",
            str(sum(found < start for found in measured)),
        )
    Console(width=150).print(table)


def _form(rule: Rule) -> str:
    """Return the rule with 1 in place of all numbers."""
    return str(rule.with_numbers([1.0] * len(rule.numbers)))


@products_in_float32()
def main() -> int:
    """Ask, measure, print the table. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", default="smollm2", help="the LLM: a GGUF file, or smollm2")
    parser.add_argument("--fitness", required=True, help="the text to score and to measure on")
    parser.add_argument("--case", default="smollm2:0.3", help="the model to prune and its rate")
    parser.add_argument("--count", type=int, default=16, help="questions for each variant of the prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the windows")
    parser.add_argument("--out", type=Path, default=Path("runs/rule-prompts"))
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    try:
        check_text(given.fitness)
        find_gguf(given.gguf)
        with lock_folder(given.out, f"the rules in {given.out} are being measured by another process"):
            case = Case(given.case, str(Path(given.fitness).absolute()), given.seed, "bfloat16", given.out)
            rules = asyncio.run(ask_all(case, given.gguf, given.count, given.out))
            rng = random.Random(given.seed)
            rules[RANDOM] = [str(random_rule(rng, case.view)) for _ in range(given.count)]
            write_atomically(given.out / "rule-prompts.json", json.dumps(rules, indent=1) + "\n")
            show(case, rules)
    except SelfPrunerError as error:
        Console(stderr=True).print(f"rule_prompts: {error}", soft_wrap=True)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
