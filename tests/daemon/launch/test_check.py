"""What a search needs and takes, before anything is loaded: findings, rehearsal, arithmetic."""

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.launch.check import Finding, Report, check
from daemon.launch.expected_cost import expected_cost
from daemon.search.rehearsal import Questions, rehearse
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from protocol.queue.keys import Keys
from protocol.results.needs import DeviceSpeed, Needs
from tests.daemon.launch.test_launch import Launched, settings_for, worker_there
from tests.support.samples import SHAPE
from tests.support.schema_answers import answer
from tests.support.scripted_llm import Says, ScriptedLlm, lists_models, refuses, says
from tests.support.servers import Server

NEEDS = Needs(
    shape=SHAPE, head_parameters=1000, windows={"calibration": 4, "fitness": 2}, memory="little", weight_bytes=10**6
)
SPEED = DeviceSpeed(name="a device", multiply=1e12, solve=1e11, read=1e10, memory=10**10, is_measured=True)

SLOW = SPEED.model_copy(update={"multiply": 1e6})


async def checked(settings: Settings, needs: Needs = NEEDS) -> Report:
    return await check(settings, lambda: needs, lambda: SPEED)


def of_llm(report: Report) -> Finding:
    (found,) = (finding for finding in report.findings if finding.what.startswith("LLM"))
    return found


def local_settings(folder: Path, *more: str) -> Settings:
    text = folder / "text.txt"
    text.write_text("a text " * 40_000)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    data = [f"data.calibration={text}", f"data.fitness={text}", f"target.model={folder / 'model'}"]
    return load(None, ["search.name=checked", "target.rate=0.3", f"run.folder={folder}", *data, *more])


async def test_a_search_that_can_run_has_no_errors(tmp_path: Path) -> None:
    async with ScriptedLlm(answer) as llm:
        report = await checked(settings_for(tmp_path, llm))
    assert not report.errors
    assert of_llm(report).state == "ok" and "JSON schema; usable after 1 question" in of_llm(report).says
    assert not (tmp_path / "test").exists()


async def test_files_that_are_there_are_no_error_and_the_search_leaves_nothing(tmp_path: Path) -> None:
    settings = local_settings(tmp_path)
    report = await checked(settings)
    assert not report.errors and of_llm(report).state == "warning"
    assert report.record["ok"] and report.record["cost"]["hours"]["expected"] > 0
    assert not settings.folder.exists()


@pytest.mark.parametrize(
    ("script", "models", "state", "says_"),
    [
        ([refuses(401, "wrong key")], [refuses(401, "wrong key")], "error", "refuses the key"),
        ([refuses(404, "no", "model_not_found")], [lists_models("other")], "error", "does not know the model 'm'"),
        ([says("I cannot do that.")], None, "warning", "try `moves`"),
        ([refuses(500, "out of order")], None, "error", "out of order"),
    ],
)
async def test_an_endpoint_that_does_not_work_is_found_before_the_search(
    tmp_path: Path, script: Any, models: Any, state: str, says_: str
) -> None:
    async with ScriptedLlm(script, models=models) as llm:
        found = of_llm(await checked(settings_for(tmp_path, llm, "llm.attempts=1", "llm.reasks=0")))
    assert (found.state, says_ in found.says) == (state, True), found


@pytest.mark.parametrize("asks", [True, False])
async def test_an_endpoint_that_is_not_there_is_an_error(tmp_path: Path, asks: bool) -> None:
    async with ScriptedLlm(answer) as llm:
        settings = settings_for(tmp_path, llm, "llm.attempts=1")
    found = of_llm(await check(settings, lambda: NEEDS, lambda: SPEED, asks=asks))
    assert found.state == "error" and "does not answer: nothing listens on 127.0.0.1:" in found.says


@pytest.mark.parametrize(
    "who",
    [
        ("search.initializer=rules", "search.mutator=rules", "search.crossover=rules"),
        ("search.initializer=random", "search.selector=tournament", "search.mutator=ranked"),
        ("search.proposer=best-of-n",),
    ],
)
async def test_an_llm_with_any_one_role_is_asked_a_question_of_that_role(tmp_path: Path, who: tuple[str, ...]) -> None:
    async with ScriptedLlm(answer) as llm:
        assert of_llm(await checked(settings_for(tmp_path, llm, *who))).state == "ok"


def without_schemas(body: dict[str, Any]) -> Any:
    if body.get("response_format", {}).get("type") == "json_schema":
        return refuses(400, "response_format json_schema is not supported")
    return '{"configurations": [{"start": 0.1, "middle": 0.4, "end": 0.2, "keep": []}]}'


async def test_the_form_that_an_endpoint_takes_is_named(tmp_path: Path) -> None:
    script: Says = without_schemas
    async with ScriptedLlm(script) as llm:
        found = of_llm(await checked(settings_for(tmp_path, llm)))
    assert "asked for JSON" in found.says and "schema" not in found.says


@pytest.mark.parametrize(
    ("needs", "error"),
    [
        (NEEDS.model_copy(update={"texts_error": "the text is too short"}), "texts"),
        (NEEDS.model_copy(update={"memory_error": "it is too large"}), "memory"),
        (Needs(model_error="there is no such model"), "model"),
    ],
)
async def test_what_is_missing_is_an_error(tmp_path: Path, needs: Needs, error: str) -> None:
    report = await checked(local_settings(tmp_path), needs)
    assert report.errors == [error]
    assert report.cost is None, "nothing is measured before that is put right"


async def test_an_estimate_that_is_asked_for_is_made_in_any_case(tmp_path: Path) -> None:
    settings, unread = local_settings(tmp_path, "data.fitness_windows=100000"), NEEDS.model_copy(update={"windows": {}})
    report = await check(settings, lambda: unread, lambda: SPEED, estimates=True)
    assert report.errors == ["texts"] and report.cost is not None and report.device == "a device"
    (texts,) = (finding for finding in report.findings if finding.what == "texts")
    assert "is too short: 280,000 bytes cannot give" in texts.says


async def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    report = await checked(local_settings(tmp_path, "redis.url=redis://127.0.0.1:1/0"))
    assert report.errors == ["Redis"]


@pytest.mark.one_server
async def test_a_server_that_is_there_is_not(tmp_path: Path, server: Server) -> None:
    assert not (await checked(local_settings(tmp_path, f"redis.url={server.url}"))).errors


@pytest.mark.one_server
@pytest.mark.parametrize("reply", ["edits", "moves", "lists"])
async def test_a_search_asks_as_many_questions_as_its_rehearsal_of_about_the_same_length(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path, reply: str
) -> None:
    async with ScriptedLlm(answer) as llm:
        settings = settings_for(tmp_path, llm, f"llm.reply={reply}", "llm.reasks=0")
        planned = (await rehearse(settings, SHAPE)).total(settings.search.rounds)
        async with worker_there(redis, keys):
            await Launched(settings, server).end()
        asked = [body for body in llm.bodies if body.get("max_tokens") != 1]
    assert len(asked) == planned.questions
    characters = sum(len(message["content"]) for body in asked for message in body["messages"])
    assert characters / 3.5 == pytest.approx(planned.prompt_tokens, rel=0.1)


QUESTIONS = Questions(2, 3500, 1000, 3, 7000, 300)


def test_a_search_with_twice_the_windows_measures_twice_as_long(tmp_path: Path) -> None:
    settings = local_settings(tmp_path)
    twice = NEEDS.model_copy(update={"windows": {"calibration": 4, "fitness": 4}})
    one, two = (expected_cost(settings, needs, SPEED, None).seconds_per_evaluation for needs in (NEEDS, twice))
    assert two.expected == pytest.approx(2 * one.expected) and one.least < one.expected < one.most


def test_texts_that_are_written_together_take_less_time_until_computing_takes_longer_than_reading(
    tmp_path: Path,
) -> None:
    texts = ["data.calibration=self", "data.fitness=self", "data.calibration_windows=56", "data.fitness_windows=8"]
    settings = load(
        None, ["search.name=checked", "target.model=m", "target.rate=0.3", f"run.folder={tmp_path}", *texts]
    )
    hours = [
        expected_cost(settings, NEEDS.model_copy(update={"texts_together": n}), speed, None).preparation_hours.expected
        for n, speed in ((1, SPEED), (16, SPEED), (64, SPEED), (1, SLOW), (64, SLOW))
    ]
    assert hours[0] > hours[1] > hours[2] and hours[3] == hours[4] > hours[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "about 20 of 20 candidates"),
        (("llm.share=0.5", "llm.reply=moves"), "about 15 of 20 candidates; search.initializer"),
        (("search.initializer=plans", "llm.reply=moves", "llm.share=0.5"), "about 5 of 20 candidates"),
        (("search.mutator=plans", "search.seeds=[owl]", "llm.reply=moves"), "about 13 of 20 candidates"),
    ],
)
def test_it_says_how_many_candidates_the_llm_proposes(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    size = ("search.population=10", "search.rounds=2", "search.mutations=3", "search.crossovers=2")
    cost = expected_cost(local_settings(tmp_path, *size, *more), NEEDS, SPEED, QUESTIONS)
    assert any(line.startswith(f"proposals by the LLM: {said}") for line in cost.arithmetic)


def test_money_is_tokens_times_price(tmp_path: Path) -> None:
    endpoint = "{base_url: 'http://x/v1', model: m, price_in: 2, price_out: 10}"
    settings = local_settings(tmp_path, f"llm.endpoints=[{endpoint}]", "search.rounds=10")
    cost = expected_cost(settings, NEEDS, SPEED, QUESTIONS)
    assert cost.money is not None
    assert cost.prompt_tokens.least == (3500 + 10 * 7000) / 3.5
    assert cost.money.expected == pytest.approx(2e-6 * cost.prompt_tokens.expected + 10e-6 * cost.reply_tokens.expected)
    assert any("per million" in line for line in cost.arithmetic)


@pytest.mark.parametrize(
    "more",
    [
        ("search.population=1",),
        ("search.seeds=[owl,uniform,first-layer,llm-pruner]",),
        ("search.rounds=0",),
        ("search.mode=steady-state",),
        ("search.proposer=best-of-n",),
        ("llm.reply=rules", "llm.what_if=2"),
        ("llm.share=0.3", "llm.reply=moves"),
    ],
)
async def test_any_search_can_be_rehearsed(tmp_path: Path, more: tuple[str, ...]) -> None:
    async with ScriptedLlm(answer) as llm:
        questions = await rehearse(settings_for(tmp_path, llm, *more), SHAPE)
    assert questions.first + questions.each_round > 0


async def test_in_steady_state_each_question_is_for_one_candidate(tmp_path: Path) -> None:
    async with ScriptedLlm(answer) as llm:
        more = ("llm.reply=lists", "search.selector=tournament")
        rounds = [
            await rehearse(settings_for(tmp_path, llm, *more, f"search.mode={mode}"), SHAPE)
            for mode in ("generational", "steady-state")
        ]
    assert [each.each_round for each in rounds] == [2, 3]  # two mutations and one crossover


def test_a_search_that_asks_no_llm_waits_for_none_and_pays_nothing(tmp_path: Path) -> None:
    cost = expected_cost(local_settings(tmp_path), NEEDS, SPEED, None)
    assert cost.money is None and cost.questions.most == 0
    assert not any("LLM" in line for line in cost.arithmetic)


def test_a_measured_answer_replaces_the_assumed_one(tmp_path: Path) -> None:
    settings = local_settings(tmp_path)
    quick, slow = (expected_cost(settings, NEEDS, SPEED, QUESTIONS, seconds).hours for seconds in (1.0, 100.0))
    assert slow.expected > quick.expected
