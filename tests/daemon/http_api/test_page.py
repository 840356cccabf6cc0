"""What the page of a search is served. tests/browser opens it in a browser."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agents.population.population import Population
from daemon.http_api import page
from daemon.http_api.page import FILES
from daemon.monitor.charts import draw_progress
from daemon.monitor.drawing import Drawing
from daemon.monitor.family import GENERATIONS, family_of
from daemon.monitor.record import SearchRecord
from daemon.monitor.report import CHARTS, overview
from tests.support.http_client import Asked
from tests.support.observed import Observed, every_third_fails
from tests.support.samples import PROFILE, candidate
from tests.support.servers import eventually

pytestmark = pytest.mark.one_server


@pytest.mark.parametrize("path", FILES)
async def test_the_files_of_the_page_need_no_token_and_name_nothing_elsewhere(ask: Asked, path: str) -> None:
    async with ask.request(path, token=None) as response:
        text = await response.text()
        assert response.status == 200 and response.content_type == FILES[path][1]
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert not re.search(r"""(src|href|fetch\(|url\()=?["']?(https?:)?//""", text)
    assert "innerHTML" not in text and "eval(" not in text


async def test_the_charts_and_tables_are_those_of_the_report(it: Observed) -> None:
    await it.searched(every_third_fails)
    record = it.observer.record
    assert record is not None
    status, shown = await it.ask("/api/overview")
    assert status == 200 and shown.items() >= json.loads(json.dumps(overview(record))).items()
    assert shown["planned"] == 15 and shown["seconds_left"] == 0
    async with it.ask.request("/api/charts/progress") as response:
        assert response.content_type == "image/svg+xml" and await response.text() == draw_progress(record).svg


@pytest.mark.parametrize("path", ["/api/overview", *(f"/api/charts/{name}" for name in CHARTS)])
async def test_they_need_the_token(it: Observed, path: str) -> None:
    assert (await it.ask(path, token=None))[0] == 401


async def test_before_the_model_is_measured_there_is_nothing_to_draw(ask: Asked) -> None:
    async with ask.request("/api/overview") as response:
        assert response.status == 200 and await response.json() is None
    status, answer = await ask("/api/charts/progress")
    assert status == 503 and "before the model has been measured" in answer["error"]
    assert (await ask("/api/charts/none"))[0] == 404


async def test_the_questions_that_led_to_a_candidate_are_found_in_the_transcript(it: Observed) -> None:
    await it.searched()
    candidate = next(e.candidate for e in it.search.state.population if e.candidate.provenance.source == "llm")
    who = candidate.provenance
    label = f"{who.agent} round {who.round} call {who.call} attempt 0"
    other = label.replace(f"call {who.call}", f"call {who.call}1")
    lines = [json.dumps({"label": each, "text": each, "messages": []}) for each in (label, other)]
    (it.observer.folder / "transcript.jsonl").write_text("not JSON\n" + "\n".join([*lines, lines[0][:30]]))
    async with it.ask.request(f"/api/candidates/{candidate.id}/questions") as response:
        assert [record["label"] for record in await response.json()] == [label]
    assert (await it.ask("/api/candidates/none/questions"))[0] == 404


async def test_a_candidate_s_ancestors_and_its_changes_against_each_parent_are_told(it: Observed) -> None:
    await it.searched()
    ledger = it.search.state.ledger
    child = next(c for c in ledger.values() if len(c.provenance.parents) == 2)
    status, family = await it.ask(f"/api/candidates/{child.id}/family")
    assert status == 200 and [each["id"] for each in family["parents"]] == list(child.provenance.parents)
    units = it.search.state.profile.shape.units(it.search.state.spec.granularity)
    for parent, told in zip(child.provenance.parents, family["changes"], strict=True):
        rates = {unit.name: pair for unit, *pair in zip(units, ledger[parent].rates, child.rates, strict=True)}
        differing = {name: pair for name, pair in rates.items() if abs(pair[0] - pair[1]) >= 0.0005}
        assert told["parent"] == parent and told["more"] == 0
        assert {each["unit"]: [each["parent"], each["child"]] for each in told["units"]} == differing
    assert (await it.ask("/api/candidates/none/family"))[0] == 404


def test_a_long_line_of_ancestors_is_cut_and_none_is_followed_twice() -> None:
    ledger = {}
    for number in range(40):
        one = candidate((0.3,) * 4)
        parents = tuple(str(earlier) for earlier in (number - 1, number - 2) if earlier >= 0)
        who = one.provenance.model_copy(update={"parents": parents})
        ledger[str(number)] = one.model_copy(update={"id": str(number), "provenance": who})
    family = family_of("39", PROFILE.shape.units("layer"), ledger, Population())
    told: list[str] = []

    def walk(member: dict[str, Any], depth: int) -> None:
        assert depth <= GENERATIONS
        told.append(member["id"])
        for parent in member["parents"]:
            walk(parent, depth + 1)

    walk(family, 0)
    assert len(told) <= 2 * (2 * GENERATIONS + 1) and family["fitness"] is None
    told.clear()
    lines: dict[str, tuple[str, ...]] = {"39": ("1", "6")} | {str(number): (str(number + 1),) for number in range(1, 8)}
    line = {
        id_: one.model_copy(update={"provenance": one.provenance.model_copy(update={"parents": lines.get(id_, ())})})
        for id_, one in ledger.items()
    }
    walk(family_of("39", PROFILE.shape.units("layer"), line, Population()), 0)
    assert "7" in told, "it is a grandparent, and also at the end of a long line"


async def test_what_each_endpoint_cost_and_brought_stands_beside_its_state(it: Observed) -> None:
    it.observer.count_question({"label": "mutator round 1 call 0 attempt -2", "endpoint": "scripted", "text": "{}"})
    for attempt, text in enumerate(("no JSON", None, "{}")):
        label = f"mutator round 1 call 0 attempt {attempt}"
        it.observer.count_question({"label": label, "endpoint": text and "scripted", "text": text})
    it.observer.count_question({"label": "mutator round 1 call 1 attempt 0", "endpoint": "scripted", "text": None})
    await it.searched()
    _, shown = await it.ask("/api/overview")
    by_llm = [row for row in shown["agents"] if row["endpoint"] == "scripted"]
    scripted = shown["endpoints"]["scripted"]
    assert by_llm and scripted["measured"] == sum(row["measured"] for row in by_llm)
    assert scripted["improved"] == sum(row["improved"] for row in by_llm)
    assert (scripted["answer_seconds"], scripted["cost"]) == (2.0, 0.25)
    assert shown["questions"] == {"mutator": {"asked": 2, "asked_again": 2, "unanswered": 1}}


async def test_a_chart_is_drawn_once_for_all_who_ask_and_anew_after_a_while(
    it: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def counted(record: SearchRecord) -> Drawing:
        drawn.append(1)
        return draw_progress(record)

    monkeypatch.setitem(CHARTS, "progress", counted)
    async with it.ask.request("/api/charts/progress") as response:
        before = await response.text()

    async def charts() -> str:
        async with it.ask.request("/api/charts/progress") as response:
            text: str = await response.text()
            return text

    assert set(await asyncio.gather(*(charts() for _ in range(20)))) == {before} and len(drawn) == 1
    await it.searched()
    monkeypatch.setattr(page, "LEAST_SECONDS", 0)
    await eventually(lambda: _differs(charts, before))
    assert len(drawn) == 2


async def _differs(get: Callable[[], Awaitable[str]], before: str) -> bool:
    return await get() != before
