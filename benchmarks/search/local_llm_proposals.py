"""How well a local LLM serves the agents: share of usable proposals, distinct plans, tokens and seconds.

    python benchmarks/search/local_llm_proposals.py [--gguf FILE] [--reply edits] [--granularity block] [--rounds 2]

No candidate is measured. An invented fitness, with a few fragile units, ranks the candidates, so that the times are
those of the requests alone.
Prints a table, and the same as JSON in the last line.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import structlog

from agents.crossover import Crossover
from agents.initializer import Initializer
from agents.llm.chat import Chat
from agents.llm.endpoint import Endpoint
from agents.llm.policy import ChatPolicy
from agents.mutator import Mutator
from agents.population.view import Accepted, Member, Refused, View
from agents.prompting.settings import AgentSettings
from agents.selector import Selector
from protocol.errors import BudgetError
from protocol.plans.candidate import Candidate, Provenance, candidate_id
from protocol.plans.profile import DensePerplexity, ModelProfile
from protocol.plans.shape import LayerShape, ModelShape
from protocol.plans.spec import SearchSpec, TextSpec

SHAPE = ModelShape(
    family="llama",
    hidden_size=576,
    head_dim=64,
    layers=(LayerShape(query_heads=9, kv_heads=3, mlp_channels=1536),) * 30,
    query_head_parameters=73_728,
    kv_head_parameters=73_728,
    channel_parameters=1_728,
    attention_fixed=576,
    mlp_fixed=576,
    other_parameters=28_312_128,
)


class Ledger:
    """Accepts proposals as the search does, and gives each an invented fitness."""

    def __init__(self, spec: SearchSpec, profile: ModelProfile) -> None:
        self.spec, self.profile = spec, profile
        self.members: dict[str, Member] = {}
        self.refused: Counter[str] = Counter()

    async def submit(self, rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        """Accept a new plan, refuse a known one."""
        try:
            feasible = self.spec.feasible(tuple(rates), self.profile.shape)
            plan = self.spec.plan(feasible, self.profile.shape)
        except BudgetError as error:
            self.refused[f"{provenance.source}: budget"] += 1
            return Refused(str(error))
        id_ = candidate_id(plan, self.spec.fingerprint)
        if id_ in self.members:
            self.refused[f"{provenance.source}: duplicate"] += 1
            return Refused("it prunes the model exactly as an earlier configuration does")
        damage = sum(s * (r**2) for s, r in zip(self.profile.sensitivity, feasible, strict=True))
        candidate = Candidate(id=id_, rates=feasible, plan=plan, provenance=provenance)
        self.members[id_] = Member(candidate, 20 + 20 * damage)
        return Accepted(id_)

    def view(self, round_: int) -> View:
        """Return the view of the agents."""
        best = sorted(self.members.values(), key=lambda member: member.fitness)
        return View(self.spec, self.profile, round_, tuple(best[:30]))


def make_ledger(granularity: Literal["layer", "block"], rate: float) -> Ledger:
    """Return an empty ledger for SmolLM2's shape. Its first blocks are fragile, as in measurements of SmolLM2."""
    text = TextSpec(source="wikitext2", windows=4, seqlen=1024)
    spec = SearchSpec(model="smollm2", rate=rate, granularity=granularity, calibration=text, fitness=text)
    units = SHAPE.units(granularity)
    sensitivity = [2.6 if unit.layer == 1 and unit.kind == "attention" else 0.02 for unit in units]
    sensitivity = [
        s + (0.5 if unit.layer == 0 else 0.002 * unit.layer) for s, unit in zip(sensitivity, units, strict=True)
    ]
    dense = DensePerplexity(perplexity=17.8, tokens=4096, windows=8, seconds=1.0)
    profile = ModelProfile(
        fingerprint=spec.fingerprint,
        model="SmolLM2-135M-Instruct",
        shape=SHAPE,
        dense=dense,
        dense_report=None,
        sensitivity=tuple(sensitivity),
        texts="",
        device="cpu",
    )
    return Ledger(spec, profile)


async def run(options: argparse.Namespace, endpoint: Endpoint) -> list[dict[str, Any]]:
    """Ask for a first population and some rounds; return a row of figures for each agent."""
    ledger = make_ledger(options.granularity, options.rate)
    settings = AgentSettings(reply=options.reply, temperature=options.temperature, reasks=options.reasks)
    rows: list[dict[str, Any]] = []

    def record(entry: dict[str, object]) -> None:
        if options.show:
            print(
                entry["label"], entry["completion_tokens"], entry["finish_reason"], repr(entry["text"]), entry["error"]
            )

    async with Chat([endpoint], ChatPolicy(concurrency=options.slots), record=record) as chat:
        await chat.wait_ready()

        async def timed(agent: str, wanted: int, work: Any) -> Any:
            before, usage = time.monotonic(), chat.usage[endpoint.name]
            start = (usage.requests, usage.prompt_tokens, usage.completion_tokens, len(ledger.members))
            ledger.refused.clear()
            result = await work
            new = [m.candidate.provenance.source for m in ledger.members.values()][start[3] :]
            seconds = time.monotonic() - before
            rows.append(
                {
                    "agent": agent,
                    "wanted": wanted,
                    "llm": new.count("llm") if agent != "selector" else int(result.source == "llm"),
                    "fallback": new.count("fallback") if agent != "selector" else int(result.source != "llm"),
                    "requests": usage.requests - start[0],
                    "prompt_tokens": (usage.prompt_tokens - start[1]) / wanted,
                    "completion_tokens": (usage.completion_tokens - start[2]) / wanted,
                    "seconds": seconds / wanted,
                    "refused": dict(ledger.refused),
                }
            )
            return result

        initializer, selector = Initializer(chat, settings), Selector(chat, settings)
        mutator, crossover = Mutator(chat, settings), Crossover(chat, settings)
        await timed("initializer", options.count, initializer.propose(ledger.view(0), options.count, ledger.submit))
        for round_ in range(1, options.rounds + 1):
            view = ledger.view(round_)
            parents = (await timed("selector", 1, selector.select(view, options.count))).parents
            await timed("mutator", options.count, mutator.propose(view, parents, options.count, ledger.submit))
            await timed("crossover", options.count, crossover.propose(view, parents, options.count, ledger.submit))
            print(f"round {round_}: best {ledger.view(0).population[0].fitness:.2f}, parents", len(parents))
    return rows


def main() -> None:
    """Serve the model, run the agents, print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", default="smollm2")
    parser.add_argument("--reply", default="edits", choices=["edits", "lists"])
    parser.add_argument("--granularity", default="layer", choices=["layer", "block"])
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--count", type=int, default=10, help="candidates by each agent in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--reasks", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--no-grammar", dest="grammar", action="store_false", help="send schemas, no grammar")
    parser.add_argument("--show", action="store_true", help="print every answer")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    command = [sys.executable, "-m", "daemon.local.llm_server", "--gguf", options.gguf, "--slots", str(options.slots)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        served = json.loads(server.stdout.readline())
        endpoint = Endpoint("local", served["base_url"], served["model"], grammar=options.grammar)
        rows = asyncio.run(run(options, endpoint))
        server.terminate()
    for row in rows:
        figures = "  ".join(f"{name} {row[name]:7.1f}" for name in ("prompt_tokens", "completion_tokens", "seconds"))
        print(
            f"{row['agent']:12} wanted {row['wanted']:3}  llm {row['llm']:3}  fallback {row['fallback']:3}  "
            f"requests {row['requests']:3}  {figures}  {row['refused']}"
        )
    print(json.dumps({"options": vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
