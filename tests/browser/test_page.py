"""The page of a search in a real browser: Chromium, without a screen."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page
from pydantic import SecretStr
from redis.asyncio import Redis

from daemon.http_api.token import PAGE_FILE, Access, page_file
from daemon.monitor.events import Event, evaluation_event
from protocol.queue.control import Control
from protocol.queue.keys import Keys
from tests.support.browser import Seen, browsing, picture, shows
from tests.support.conducted import evaluating
from tests.support.http_client import TOKEN
from tests.support.observed import Observed, every_third_fails, observed
from tests.support.servers import eventually

pytestmark = pytest.mark.one_server
EVENTS_SHOWN = 100
"""As in page.js."""
EVENTS_PER_BATCH = 200
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture
async def it(redis: Redis, keys: Keys, tmp_path: Path) -> AsyncIterator[Observed]:
    async with observed(redis, keys, tmp_path) as it:
        yield it


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
async def page(it: Observed, seen: Seen) -> AsyncIterator[Page]:
    async with browsing(lambda: it.ask.url, seen) as page:
        yield page


async def opened(page: Page, it: Observed) -> None:
    """Open the page by a link with the token, as a terminal shows it."""
    await page.goto(f"{it.ask.url}/#token={TOKEN}")
    await page.wait_for_selector("#facts dd")


async def test_a_search_is_seen_from_its_start_to_its_end(
    page: Page, it: Observed, seen: Seen, redis: Redis, keys: Keys
) -> None:
    await opened(page, it)
    assert TOKEN not in page.url
    async with evaluating(redis, keys, every_third_fails):
        await it.run()
    await shows(page, "#facts", lambda text: "finished" in text)
    best = it.search.state.population.best()
    assert best is not None
    await shows(page, "#best", lambda text: best.candidate.id in text)
    for chart in ("progress", "rates", "population"):
        await page.wait_for_selector(f"#{chart} svg path, #{chart} svg rect")
    assert "mutator" in await page.inner_text("#agents")
    assert "candidate_measured" in await page.inner_text("#events")
    assert "new best" in await page.inner_text("#endpoints") and "busy" in await page.inner_text("#workers")
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        await picture(page, scheme)
        assert (await Axe().run(page)).violations_count == 0
    await page.set_viewport_size({"width": 390, "height": 800})
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    await picture(page, "narrow")
    assert (seen.complaints, seen.elsewhere) == ([], [])


@pytest.mark.browser
async def test_a_click_pauses_and_resumes(page: Page, it: Observed, redis: Redis, keys: Keys) -> None:
    await opened(page, it)
    await page.click("#pause")
    control = Control(redis, keys)
    await eventually(lambda: _is(control, "pause"))
    await shows(page, "#pause", lambda text: text == "Resume")
    await shows(page, "#facts", lambda text: "paused" in text)
    await page.click("#pause")
    await eventually(lambda: _is(control, "run"))


async def _is(control: Control, command: str) -> bool:
    return await control.read() == command


@pytest.mark.browser
async def test_a_candidate_and_its_parents_are_opened(page: Page, it: Observed) -> None:
    await it.searched()
    offspring = next(e for e in it.search.state.population.top(10) if e.candidate.provenance.parents)
    who = offspring.candidate.provenance
    label = f"{who.agent} round {who.round} call {who.call} attempt 0"
    message = {"role": "user", "content": HOSTILE}
    asked = {"label": label, "endpoint": HOSTILE, "text": HOSTILE, "messages": [message]}
    (it.observer.folder / "transcript.jsonl").write_text(json.dumps(asked) + "\n")
    await opened(page, it)
    await page.click(f"#best button:text('{offspring.candidate.id}')")
    await shows(page, "#candidate-title", lambda text: offspring.candidate.id in text)
    await page.click("#candidate-questions summary")
    await shows(page, "#candidate-questions pre", lambda text: text == HOSTILE)
    await picture(page, "candidate")
    parent = offspring.candidate.provenance.parents[0]
    changes = await page.inner_text("#candidate-family")
    assert "Share removed, against its parent" in changes and "→" in changes and "Ancestors" in changes
    assert (await Axe().run(page)).violations_count == 0
    await page.click(f"#candidate-family li button:text('{parent}')")
    await shows(page, "#candidate-title", lambda text: parent in text)
    await page.keyboard.press("Escape")
    assert not await page.is_visible("#candidate")


@pytest.mark.browser
async def test_the_file_that_selfpruner_open_shows_leads_to_the_page(page: Page, it: Observed, tmp_path: Path) -> None:
    with page_file(Access(SecretStr(TOKEN), tmp_path / "http-token"), it.ask.url, tmp_path):
        await page.goto((tmp_path / PAGE_FILE).as_uri())
        await page.wait_for_selector("#facts dd")
    assert TOKEN not in page.url


@pytest.mark.browser
async def test_the_page_asks_for_the_token_and_says_when_it_is_wrong(page: Page, it: Observed) -> None:
    await page.goto(it.ask.url)
    await page.wait_for_selector("#token")
    await picture(page, "login")
    await page.fill("#token", "not-the-token-of-this-search")
    await page.keyboard.press("Enter")
    await shows(page, "#login-error", lambda text: "not the token" in text)
    await page.fill("#token", TOKEN)
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#facts dd")


@pytest.mark.browser
async def test_what_a_model_wrote_is_shown_and_not_run(page: Page, it: Observed, seen: Seen) -> None:
    await it.searched()
    best = it.search.state.population.best()
    assert best is not None
    who = best.candidate.provenance.model_copy(update={"endpoint": HOSTILE + "x" * 10**6})
    object.__setattr__(best.candidate, "provenance", who)
    await opened(page, it)
    await shows(page, "#agents", lambda text: HOSTILE in text)
    await page.click(f"#best button:text('{best.candidate.id}')")
    await page.click("#candidate summary:text('The whole record')")
    await shows(page, "#candidate-record", lambda text: "<script>" in text)
    assert await page.evaluate("document.querySelectorAll('img, main script').length") == 0
    assert seen.complaints == []


@pytest.mark.browser
async def test_a_day_of_events_leaves_the_memory_of_the_page_as_it_was(page: Page, it: Observed) -> None:
    """A day with an event every four seconds: it holds no more nodes, listeners or objects than before."""
    await it.searched()
    best = it.search.state.population.best()
    assert best is not None
    async with page.expect_response("**/api/events"):
        await opened(page, it)
    await day_of_events(
        page, it, evaluation_event(best, best=False), batches=50
    )  # then the browser's own lists are full
    first = await held(page)
    await day_of_events(page, it, evaluation_event(best, best=False), batches=100)
    last = await held(page)
    assert await page.locator("#events li").count() == EVENTS_SHOWN
    grown = {name: last[name] / first[name] for name in first}
    assert all(factor < 1.1 for factor in grown.values()), (first, last)


async def day_of_events(page: Page, it: Observed, event: Event, batches: int) -> None:
    """Add batches of events, and let the page draw everything again after each, as it does once a second."""
    for number in range(batches):
        it.observer.events.add([event] * (EVENTS_PER_BATCH - 1) + [Event(f"batch-{number}", {})])
        await page.evaluate("chartsOf = -1; lastLook = -1; refresh()")
    await shows(page, "#events", lambda text: f"batch-{batches - 1}" in text)


async def held(page: Page) -> dict[str, float]:
    """Return what the page holds, without what nothing refers to any more."""
    session = await page.context.new_cdp_session(page)
    for _ in range(3):
        await session.send("HeapProfiler.collectGarbage")
    counters = await session.send("Memory.getDOMCounters")
    usage = await session.send("Runtime.getHeapUsage")
    return {"nodes": counters["nodes"], "listeners": counters["jsEventListeners"], "bytes": usage["usedSize"]}
