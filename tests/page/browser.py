"""A real browser: Debian's Chromium, driven by playwright. Tests that want one are skipped where there is none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

SHOTS = os.environ.get("PENUMBRA_TEST_SCREENSHOTS")
"""Folder to leave screenshots in, for people who want to see what was tested."""

WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one module, none of whose tests is async: while it lives, playwright runs an event loop on this thread."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium on PATH; `apt-get install chromium` brings one")
    with sync_playwright() as driver:
        # As root, which containers often are, Chromium has no sandbox to offer; it only sees our own page here.
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=WAIT_MS * 2)
        yield running
        running.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """The page at `url`, live. Whatever it complains of fails the test."""
    told: list[str] = []
    page = browser.new_page(**{"viewport": {"width": 1440, "height": 1080}, **context})
    page.set_default_timeout(WAIT_MS)
    page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    try:
        page.goto(url)
        page.wait_for_selector('#connection[data-state="live"]')
        yield page
    finally:
        page.close()
    assert not told, told


def shoot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")
