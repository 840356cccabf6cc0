"""The page of a search that `selfpruner run` runs, with the real model and a real LLM, from its start to its stop."""

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page
from redis.asyncio import Redis

from tests.support.browser import Seen, browsing, picture, shows
from tests.support.real_model import need_smollm2
from tests.support.root import ROOT
from tests.support.servers import eventually

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1500)]
SMALLER = ("data.fitness_windows=2", "data.report_windows=1", "data.calibration_windows=8", "data.seqlen=128")
SLOW = 900.0
"""Longest time in seconds from the start to the first candidates, on two busy cores."""


async def test_the_page_of_a_running_quickstart_is_opened_watched_paused_resumed_and_stopped(tmp_path: Path) -> None:
    need_smollm2()
    seen, folder = Seen(), tmp_path / "runs" / "quickstart"
    sets = [word for setting in SMALLER for word in ("--set", setting)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "daemon", "run", "--json", *sets),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        await eventually(lambda: bool(_url(folder)) and (folder / "http-token").exists(), seconds=60)
        async with browsing(lambda: _url(folder), seen) as page:
            await page.goto(f"{_url(folder)}/#token={(folder / 'http-token').read_text().strip()}")
            await shows(page, "#verdict", lambda text: "being prepared" in text, 120)
            await picture(page, "preparing")
            await shows(page, "#facts", lambda text: _ratio(text) is not None, SLOW)
            first = _ratio(await page.inner_text("#facts"))
            await shows(page, "#facts", lambda text: _ratio(text) not in (None, first), SLOW)
            await _paused_and_resumed(page, folder)
            await page.click("#best button")
            await page.click("#candidate summary:text('The whole record')")
            await shows(page, "#candidate-record", lambda text: '"rates"' in text)
            await picture(page, "running")
            await page.keyboard.press("Escape")
            assert "busy" in await page.inner_text("#workers") and "seconds per answer" in await page.inner_text(
                "#endpoints"
            )
            page.on("dialog", lambda dialog: asyncio.ensure_future(dialog.accept()))
            await page.click("#stop")
            out, _ = await asyncio.wait_for(process.communicate(), 180)
        assert process.returncode == 0 and json.loads(out)["finished"] is False
        assert seen.elsewhere == [] and [text for text in seen.complaints if "ERR_" not in text] == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _paused_and_resumed(page: Page, folder: Path) -> None:
    """Pause by a click, see the Redis key and the page say so, and resume."""
    redis: Any = Redis.from_url(f"unix://{folder}/valkey/valkey.sock", decode_responses=True)
    key = "selfpruner:quickstart:control"
    await page.click("#pause")
    await eventually(lambda: _has(redis, key, "pause"))
    await shows(page, "#facts", lambda text: "paused" in text)
    await page.click("#pause")
    await eventually(lambda: _has(redis, key, "run"))
    await redis.aclose()


async def _has(redis: Any, key: str, value: str) -> bool:
    return bool(await redis.get(key) == value)


def _url(folder: Path) -> str:
    """The address that the log names; empty before it is there."""
    with suppress(OSError):
        for line in (folder / "log.jsonl").read_text().splitlines():
            if '"http_api_listening"' in line:
                return str(json.loads(line)["url"])
    return ""


def _ratio(facts: str) -> float | None:
    """The figure best ÷ uniform on the page."""
    lines = facts.splitlines()
    after = lines[lines.index("best ÷ uniform") + 1] if "best ÷ uniform" in lines else "–"
    return None if after == "–" else float(after)
