"""What the page of a search is served. tests/browser opens it in a browser."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable

import pytest

from daemon.http_api import page
from daemon.http_api.page import FILES
from daemon.monitor.charts import draw_progress
from daemon.monitor.drawing import Drawing
from daemon.monitor.record import SearchRecord
from daemon.monitor.report import CHARTS, overview
from tests.support.http_client import Asked
from tests.support.observed import Observed, every_third_fails
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
