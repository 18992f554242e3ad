"""The front page of a real cluster: who is there, what they answer, and where the time of an answer went."""

from __future__ import annotations

import json
import re
import time

import httpx
from playwright.sync_api import Browser, expect

from tests.cluster.local_cluster import LocalCluster
from tests.page.browser import WAIT_MS, opened, shoot

MARKUP = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


def test_a_conversation_streams_and_shows_where_its_time_went(browser: Browser, cluster: LocalCluster) -> None:
    with opened(browser, cluster.url) as page:
        expect(page.locator("#pole-prefill")).to_have_text("Prefill · 1", timeout=WAIT_MS)
        expect(page.locator("#pole-decode")).to_have_text("Decode · 1", timeout=WAIT_MS)
        page.keyboard.press("c")
        page.keyboard.type(MARKUP)
        page.keyboard.press("Enter")
        answer = page.locator(".said.assistant")
        expect(answer.locator(".facts")).to_contain_text(re.compile(r"answer \d+ tokens"), timeout=WAIT_MS * 2)
        expect(answer.locator(".facts")).to_contain_text(re.compile(r"prompt \d+ tokens, 0 cached"))
        # What was said is text, on both sides.
        assert page.locator(".said.user").inner_text() == MARKUP
        assert page.locator(".talk img, .talk script").count() == 0
        assert page.title() == "Penumbra"
        # The router tells with the answer where its time went, and the answer is drawn from that.
        expect(answer.locator(".track")).to_have_attribute(
            "aria-label", re.compile(r"prefill .*first decode .*tokens "), timeout=WAIT_MS
        )
        page.keyboard.press("Escape")
        page.keyboard.press("r")
        page.keyboard.press("ArrowDown")
        expect(page.locator("#request-detail")).to_contain_text("prefill-0 → decode-0", timeout=WAIT_MS)
        expect(page.locator("#ttft-note")).to_contain_text("p50", timeout=WAIT_MS)
        shoot(page, "cluster")


def test_a_long_prompt_shows_its_progress_and_ends_at_once_with_escape(browser: Browser, cluster: LocalCluster) -> None:
    with opened(browser, cluster.url) as page:
        # A prompt that takes seconds to compute: it is still far from done when its first progress shows.
        page.fill("#message", "It was a dark and stormy night. " * 800)
        page.keyboard.press("Enter")
        expect(page.locator(".said.assistant .facts")).to_contain_text(re.compile(r"prompt \d+% of"), timeout=WAIT_MS)
        page.keyboard.press("Escape")
        expect(page.locator(".said.assistant")).to_contain_text("Stopped.")
        expect(page.locator("#send")).to_have_text("Send")
        page.wait_for_function(
            "import('/page/state.js').then(({ state }) => state.finished.some((one) => one.failed === 'cancelled'))"
        )


def test_a_tool_call_is_shown_and_its_result_goes_back(browser: Browser, cluster: LocalCluster) -> None:
    with opened(browser, cluster.url) as page:
        page.locator("#options summary").click()
        page.click("#example-tool")
        page.select_option("#tool-choice", "required")  # the grammar lets the model write nothing else
        page.fill("#max-tokens", "900")
        page.fill("#message", "What is the weather?")
        page.keyboard.press("Enter")
        call = page.locator(".said.assistant .tool")
        expect(call.locator(".call")).to_have_text("calls weather", timeout=WAIT_MS)
        expect(page.locator("#send")).to_have_text("Send", timeout=WAIT_MS * 2)
        shoot(page, "tool-call")
        call.get_by_role("textbox").fill('{"sky": "dark"}')
        page.select_option("#tool-choice", "none")
        page.fill("#max-tokens", "8")
        call.get_by_role("button").click()
        expect(page.locator(".said.assistant")).to_have_count(2, timeout=WAIT_MS)
        facts = page.locator(".said.assistant").nth(1).locator(".facts")
        expect(facts).to_contain_text(re.compile(r"answer \d+ tokens"), timeout=WAIT_MS)


def test_reasoning_is_shown_apart_from_the_answer(browser: Browser, cluster: LocalCluster) -> None:
    with opened(browser, cluster.url) as page:
        page.locator("#options summary").click()
        page.select_option("#thinking", "enabled")
        page.fill("#max-tokens", "60")
        page.fill("#message", "Think about it.")
        page.keyboard.press("Enter")
        thought = page.locator(".said.assistant .reasoning")
        expect(thought.locator("div")).not_to_be_empty(timeout=WAIT_MS)
        expect(page.locator(".said.assistant .facts")).to_contain_text("of them reasoning", timeout=WAIT_MS)
        shoot(page, "reasoning")


def test_a_broken_tool_list_is_said_before_anything_is_sent(browser: Browser, cluster: LocalCluster) -> None:
    with opened(browser, cluster.url) as page:
        page.locator("#options summary").click()
        page.fill("#tools", '{"not": "a list"}')
        page.fill("#message", "What is the weather?")
        page.keyboard.press("Enter")
        expect(page.locator("#composer-note")).to_contain_text("The tools do not parse")
        assert page.locator(".said").count() == 0
        page.click("#example-tool")
        assert json.loads(page.input_value("#tools"))[0]["function"]["name"] == "weather"


def test_a_request_the_router_refuses_says_why_in_the_conversation(browser: Browser, cluster: LocalCluster) -> None:
    page = browser.new_page()  # a 400 is an error on the browser's console, so not `opened`
    page.goto(cluster.url)
    page.locator("#options summary").click()
    page.fill("#temperature", "9")
    page.fill("#message", "Too hot.")
    page.keyboard.press("Enter")
    expect(page.locator(".said.assistant [role=alert]")).to_contain_text("temperature", timeout=WAIT_MS)
    page.close()


def test_the_fleet_tells_what_the_decode_worker_measured_on_its_reads(cluster: LocalCluster) -> None:
    model = httpx.get(f"{cluster.url}/v1/models", timeout=10).json()["data"][0]["id"]
    body = {"model": model, "prompt": [5] * 700, "max_tokens": 2}
    assert cluster.post("/v1/completions", body).status_code == 200
    deadline = time.monotonic() + 30  # a record comes once a second
    while not (links := httpx.get(f"{cluster.url}/fleet", timeout=10).json()["links"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (link,) = links
    assert (link["prefill"], link["decode"]) == ("prefill-0", "decode-0")
    assert link["gb_s"] > 0
    assert link["bytes"] > 100_000
    (decode,) = (worker for worker in cluster.workers() if worker["role"] == "decode")
    assert decode["read_bytes"] >= decode["links"][0]["read_bytes"] > 100_000
