"""The front page over a fleet of a thousand, in a real browser: it is smooth, everybody can use it, and it runs nothing
that it was not given by us.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from router.front_page import PAGE, SECURITY
from tests.page.browser import opened, shoot
from tests.page.thousand import served

FRAMES = """async (num) => {
  const gaps = [];
  let last = await new Promise((done) => requestAnimationFrame(done));
  while (gaps.length < num) {
    const now = await new Promise((done) => requestAnimationFrame(done));
    gaps.push(now - last);
    last = now;
  }
  return gaps.sort((a, b) => a - b);
}"""

DRAWN = """async (ticks) => {
  const { surfaces } = await import("/page/canvas.js");
  const { onChange, state } = await import("/page/state.js");
  let left = ticks;
  const slowest = {};
  await new Promise((done) => onChange(() => --left || done()));
  for (const surface of surfaces) slowest[surface.canvas.id || "spark"] = surface.drawMs;
  return { workers: state.workers.size, links: state.links.size, slowest };
}"""


def test_a_thousand_workers_are_drawn_while_frames_go_on(
    browser: Browser, thousand: str, record_property: Callable[[str, object], None]
) -> None:
    with opened(browser, thousand) as page:
        drawn = page.evaluate(DRAWN, 3)
        assert drawn["workers"] == 1000
        assert drawn["links"] == 1800
        gaps = page.evaluate(FRAMES, 180)
        assert len(gaps) == 180
        for share in (50, 95, 99):
            record_property(f"frame_ms_p{share}", round(gaps[min(179, share * 180 // 100)], 1))
        for name, spent in drawn["slowest"].items():
            record_property(f"draw_ms_{name}", round(spent, 1))
        # The DOM does not grow with the fleet: neither the map nor the table has a node for each worker.
        assert page.evaluate("document.querySelectorAll('*').length") < 500
        shoot(page, "thousand-map")


def test_the_map_is_walked_with_the_keyboard_and_tells_of_each_worker(browser: Browser, thousand: str) -> None:
    with opened(browser, thousand) as page:
        page.keyboard.press("f")
        page.keyboard.press("ArrowRight")
        detail = page.locator("#worker-detail")
        detail.get_by_text("prefill-0", exact=True).wait_for()
        page.keyboard.press("ArrowRight")
        detail.get_by_text("prefill-1", exact=True).wait_for()
        for _ in range(60):
            page.keyboard.press("ArrowRight")
        detail.locator(".name", has_text=re.compile(r"^decode-\d+$")).wait_for()  # over to the other pool
        assert "GB/s, p50" in detail.inner_text()
        shoot(page, "thousand-selected")
        page.keyboard.press("Escape")
        detail.get_by_text("not serving").wait_for()


def test_the_table_holds_only_the_rows_in_sight_and_finds_sorts_and_scrolls(browser: Browser, thousand: str) -> None:
    with opened(browser, thousand) as page:
        page.keyboard.press("m")
        rows = page.locator("#workers-rows tr[data-id]")
        rows.first.wait_for()
        assert rows.count() < 60
        assert page.locator("#workers").get_attribute("aria-rowcount") == "1001"
        page.evaluate("document.getElementById('table-view').scrollTop = 1e9")
        page.locator('#workers-rows tr[aria-rowindex="1001"]').wait_for()
        shoot(page, "thousand-table")
        page.keyboard.press("/")
        page.keyboard.type("prefill-39")
        page.locator("#workers[aria-rowcount='12']").wait_for()  # prefill-39 and prefill-390 to 399
        page.get_by_role("button", name="running").click()
        page.locator("th[aria-sort='descending']", has_text="running").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong_with_it(browser: Browser, thousand: str, scheme: str) -> None:
    with opened(browser, thousand, color_scheme=scheme) as page:
        page.locator("#options summary").click()
        found = Axe().run(page)
        assert not found.response["violations"], json.dumps(
            [
                (wrong["id"], wrong["help"], [node["target"] for node in wrong["nodes"]])
                for wrong in found.response["violations"]
            ],
            indent=1,
        )
        page.keyboard.press("Escape")
        page.keyboard.press("m")
        page.locator("#workers-rows tr[data-id]").first.wait_for()
        assert not Axe().run(page, context="#table-view").response["violations"]


def test_the_theme_follows_the_system_until_it_is_chosen_and_the_choice_stays(browser: Browser, thousand: str) -> None:
    ink = "getComputedStyle(document.documentElement).backgroundColor"
    with opened(browser, thousand, color_scheme="dark") as page:
        dark = page.evaluate(ink)
        page.keyboard.press("t")  # light
        light = page.evaluate(ink)
        assert light != dark
        page.reload()
        page.wait_for_selector('#connection[data-state="live"]')
        assert page.evaluate(ink) == light
        page.keyboard.press("t")
        assert page.evaluate(ink) == dark
        page.emulate_media(color_scheme="light")
        assert page.evaluate(ink) == dark  # chosen, whatever the system says
        page.keyboard.press("t")
        assert page.evaluate(ink) == light


def test_a_router_that_went_away_is_said_and_followed_again_when_it_is_back(browser: Browser) -> None:
    with served(20) as first:
        page = browser.new_page()
        page.goto(first)
        page.wait_for_selector('#connection[data-state="live"]')
    page.wait_for_selector('#connection[data-state="lost"]')
    with served(30, port=int(first.rpartition(":")[2])):
        page.wait_for_selector('#connection[data-state="live"]')
        assert page.evaluate("import('/page/state.js').then((m) => m.state.workers.size)") == 30
    page.close()


def test_the_page_fits_a_telephone(browser: Browser, thousand: str) -> None:
    with opened(browser, thousand, viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shoot(page, "telephone")


def test_nothing_runs_or_loads_but_our_own_files(thousand: str) -> None:
    with httpx.Client(base_url=thousand) as client:
        answer = client.get("/")
        policy = answer.headers["content-security-policy"]
        assert policy == SECURITY["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "script-src 'self';" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        for file in PAGE.iterdir():
            served_file = client.get(f"/page/{file.name}")
            assert served_file.content == file.read_bytes()
            assert served_file.headers["content-security-policy"] == policy
        for outside in ("/page/../board.py", "/page/%2e%2e/board.py", "/page//etc/passwd", "/page/"):
            assert client.get(outside).status_code == 404


@pytest.mark.parametrize("file", sorted(PAGE.glob("*.js")) + sorted(PAGE.glob("*.html")), ids=lambda file: file.name)
def test_the_pages_code_makes_no_markup_of_text_and_asks_nobody_else(file: Path) -> None:
    code = file.read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert way not in code, f"{file.name} turns text into markup or code by {way}"
    assert not re.findall(r"https?://(?!www\.w3\.org)", code), f"{file.name} names another host"
    assert not re.findall(r"<script(?![^>]*\ssrc=)|\son[a-z]+=\"|\sstyle=\"", code), f"{file.name} has inline code"


def test_viewers_share_each_tick_and_one_that_missed_a_change_gets_the_frame(thousand: str) -> None:
    def follow(num: int) -> list[dict[str, object]]:
        told = []
        with httpx.stream("GET", f"{thousand}/fleet/events", timeout=30) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    told.append(json.loads(line[6:]))
                    if len(told) == num:
                        return told
        raise AssertionError("the stream ended")

    first, second, third = follow(3)
    assert [first["kind"], second["kind"], third["kind"]] == ["frame", "change", "change"]
    assert third["seq"] == second["seq"] + 1 == first["seq"] + 2  # type: ignore[operator]
    whole = httpx.get(f"{thousand}/fleet", timeout=30).json()
    assert whole["kind"] == "frame"
    assert len(whole["workers"]) == 1000
