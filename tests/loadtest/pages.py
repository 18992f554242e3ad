"""A report as a reader's browser shows it."""

from __future__ import annotations

import json
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from tests.page.browser import WAIT_MS, shoot

PLOTS = """() => [...document.querySelectorAll('figure svg')].map((svg) => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('path, use, rect')].filter((mark) => {
    const drawn = mark.getBoundingClientRect();
    return drawn.width + drawn.height > 2 && drawn.left >= box.left - 1 && drawn.right <= box.right + 1;
  });
  const ids = [...svg.querySelectorAll('[id]')].map((node) => node.id);
  return { name: svg.closest('figure').id, width: box.width, height: box.height, marks: marks.length, ids,
           words: [...svg.querySelectorAll('text')].map((text) => text.textContent) };
})"""


def plots_of(browser: Browser, path: Path, shot: str, scheme: str = "light") -> dict[str, dict[str, object]]:
    """What each picture of a report holds as Chromium draws it. The page complains of nothing, asks for nothing from
    elsewhere, is accessible, and no two of its pictures share an id.
    """
    told: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(WAIT_MS)
    page.on("console", lambda message: told.append(message.text))
    page.on("request", lambda request: None if request.url == path.as_uri() else told.append(request.url))
    try:
        page.goto(path.as_uri())
        found = page.evaluate(PLOTS)
        page.set_viewport_size({"width": 1280, "height": page.evaluate("document.documentElement.scrollHeight")})
        shoot(page, f"{shot}-{scheme}")
        wrong = Axe().run(page).response["violations"]
    finally:
        page.close()
    assert not told, told
    assert not wrong, json.dumps([(one["id"], [node["target"] for node in one["nodes"]]) for one in wrong], indent=1)
    ids = [name for plot in found for name in plot["ids"]]
    assert len(ids) == len(set(ids))
    return {plot["name"].removeprefix("plot-"): plot for plot in found}
