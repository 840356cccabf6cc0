"""Every line says whom it belongs to: the search, and the agent with its round, or the candidate."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from redis.asyncio import Redis
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from agents.population.keeper import PopulationKeeper
from agents.population.population import Population
from daemon.launch.launch import Launch
from protocol.plans.candidate import Candidate, Result
from protocol.queue.keys import Keys
from protocol.runtime import logs
from tests.daemon.launch.test_launch import settings_for, worker_there
from tests.support.samples import candidates, measured
from tests.support.scripted_llm import ScriptedLlm, refuses
from tests.support.servers import Server

pytestmark = pytest.mark.one_server

AGENTS = {"initializer", "selector", "mutator", "crossover"}
OF_A_QUESTION = {"endpoint_failed", "endpoint_cools_down", "endpoint_dialect"}


@pytest.fixture
def _unbound() -> Iterator[None]:
    yield
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("restored_logs", "_unbound")
async def test_what_befalls_a_question_says_which_agent_asked_it_in_which_round(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path
) -> None:
    """The first learns that the endpoint takes no schema, and has to wait; all others fail."""
    script = [refuses(400, "no json_schema here"), refuses(429, "slow down", headers={"retry-after-ms": "20"})]
    file = tmp_path / "log.jsonl"
    logs.configure(file=file, console=False, search="test")
    async with ScriptedLlm([*script, refuses(500, "broken")]) as llm, worker_there(redis, keys):
        settings = settings_for(
            tmp_path, llm, "llm.concurrency=1", "llm.attempts=1", "llm.failures_to_open=1000", "http.enabled=false"
        )
        launch = Launch(settings, server.url, settings.llm.endpoints, embedded=False)
        assert await asyncio.wait_for(launch.run(), 90)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line["search"] == "test" for line in lines)
    of_questions = [line for line in lines if line["event"] in OF_A_QUESTION]
    assert {line["event"] for line in of_questions} == OF_A_QUESTION
    assert {line["agent"] for line in of_questions} == AGENTS
    assert {line["round"] for line in of_questions} == {0, 1, 2}
    assert not [line for line in lines if line["event"] == "round_started" and "agent" in line]


async def test_what_befalls_an_outcome_says_of_which_candidate_it_is() -> None:
    (one,) = candidates(1)

    class Outcomes:
        async def results(self, _cursor: str) -> list[Result]:
            await asyncio.sleep(0.01)
            return [Result("1-0", one.id, measured(10, one))]

        async def apply(self, _result: Result) -> bool:
            structlog.get_logger().info("applying")
            return True

        async def drop(self, _result: Result) -> None:
            raise AssertionError

    population = Population()
    ledger: dict[str, Candidate] = {one.id: one}
    keeper = PopulationKeeper(Outcomes(), population, ledger, on_evaluation=lambda *_: None)
    with capture_logs(processors=[merge_contextvars]) as lines:
        keeping = asyncio.create_task(keeper.run())
        await keeper.settled()
        keeping.cancel()
    assert lines[0]["candidate"] == one.id
    assert "candidate" not in structlog.contextvars.get_contextvars()
