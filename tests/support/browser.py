"""Chromium without a screen, and what the pages that it shows complain about or ask for elsewhere."""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Page, Route, async_playwright

from tests.support.servers import eventually

CHROMIUM = shutil.which("chromium")


class Seen:
    """What a browser said and asked for while it showed the page."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []


@asynccontextmanager
async def browsing(url: Callable[[], str], seen: Seen) -> AsyncIterator[Page]:
    """An empty page. Notes requests to anywhere but the `url` of the search. Skips the test without Chromium."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1000, "height": 1400})

        async def only_here(route: Route) -> None:
            if not route.request.url.startswith(url()):
                seen.elsewhere.append(route.request.url)
            await route.continue_()

        await page.route("**/*", only_here)
        page.on("console", lambda message: seen.complaints.append(message.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        yield page
        await browser.close()


async def shows(page: Page, selector: str, holds: Callable[[str], bool], seconds: float = 10) -> None:
    """Wait until the text of `selector` is as it should be."""
    await eventually(lambda: _text(page, selector, holds), seconds=seconds)


async def _text(page: Page, selector: str, holds: Callable[[str], bool]) -> bool:
    return holds(await page.inner_text(selector))


async def picture(page: Page, name: str) -> None:
    """Take a picture for a person to look at, if PICTURES names a folder."""
    if folder := os.environ.get("PICTURES"):
        await page.screenshot(path=f"{folder}/{name}.png", full_page=True)
