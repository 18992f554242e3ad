"""`penumbra chat`: talk to a cluster from a terminal, and see after each answer where its time went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import EventSource
from rich.console import Console
from rich.text import Text

from cli.remote import Unreachable, client, get, told

SILENCE_S = 60.0
"""The router says something every few seconds, also while a prompt of minutes is computed."""

BAR = 48
STYLES = {"prefill": "yellow", "transfer": "cyan", "first_decode": "blue", "tokens": "blue"}
"""Colours of a timeline's parts; those before prefill are grey."""

Json = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """An answer as its stream has told it so far."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, Json] = field(default_factory=dict)
    usage: Json = field(default_factory=dict)
    finish_reason: str = ""

    def take(self, chunk: Json) -> Iterator[tuple[str, str]]:
        """("content" | "reasoning" | "call", new text)"""
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta", {})
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if text := delta.get("reasoning_content"):
                self.reasoning += text
                yield "reasoning", text
            if text := delta.get("content"):
                self.content += text
                yield "content", text
            for part in delta.get("tool_calls") or ():
                call = self.calls.setdefault(part.get("index", 0), {"name": "", "arguments": ""})
                for name, text in (part.get("function") or {}).items():
                    call[name] = call.get(name, "") + text
                    yield "call", text


def run(
    url: str, api_key: str | None, message: str | None, options: Mapping[str, Any], system: str | None, console: Console
) -> int:
    """One answer to `message`, or a conversation until the input ends. -> exit code"""
    with client(url, api_key, timeout_s=SILENCE_S) as router:
        model = options.get("model") or get(router, "/v1/models")["data"][0]["id"]
        messages: list[Json] = [{"role": "system", "content": system}] if system else []
        if message is not None:
            _say(router, {**options, "model": model}, messages, message, console)
            return 0
        console.print(f"{model} at {url}. End with Ctrl-D.", style="dim", highlight=False)
        while True:
            try:
                text = console.input("[bold]you[/bold]> ")
            except EOFError:
                console.print()
                return 0
            if text.strip():
                _say(router, {**options, "model": model}, messages, text, console)


def _say(router: httpx.Client, options: Json, messages: list[Json], text: str, console: Console) -> None:
    messages.append({"role": "user", "content": text})
    body = {key: value for key, value in options.items() if value is not None} | {
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "return_timeline": True,
    }
    answer = _stream(router, body, console)
    messages.append({"role": "assistant", "content": answer.content})
    console.print(timeline(answer.usage), highlight=False)


def _stream(router: httpx.Client, body: Json, console: Console) -> Answer:
    answer, ended, kind = Answer(), False, ""
    with (
        console.status("waiting") as status,
        router.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != 200:
            raise Unreachable(f"The router answered {response.status_code}: {told(response)}")
        for event in EventSource(response).iter_sse():
            if event.data == "[DONE]":
                ended = True
                continue
            chunk = json.loads(event.data)
            if "error" in chunk:
                raise Unreachable(f"The answer broke off: {chunk['error'].get('message')}")
            if progress := chunk.get("prompt_progress"):
                status.update(progress_line(progress))
            for what, text in answer.take(chunk):
                status.stop()
                if kind and what != kind:
                    console.print()
                kind = what
                style = {"reasoning": "dim italic", "call": "yellow"}.get(what)
                console.print(Text(text, style=style or ""), end="", soft_wrap=True)
    console.print()
    if not ended:
        raise Unreachable("The answer broke off before its end.")
    return answer


def progress_line(progress: Mapping[str, Any]) -> str:
    """`prompt 12% of 900,000 tokens, 768 cached, 41 s left`"""
    words = f"prompt {progress['processed'] / max(1, progress['total']):.0%} of {progress['total']:,} tokens"
    if progress.get("cache"):
        words += f", {progress['cache']:,} cached"
    if left := progress.get("eta_ms"):
        words += f", {left / 1e3:.0f} s left"
    return words


def timeline(usage: Mapping[str, Any]) -> Text:
    """A bar of the answer's parts, and under it their lengths and what was counted."""
    told_parts = usage.get("timeline") or {}
    parts = {
        name.removesuffix("_ms"): value
        for name, value in told_parts.items()
        if name.endswith("_ms") and name != "ttft_ms" and value >= 0.05
    }
    whole = sum(parts.values())
    text = Text()
    for name, value in parts.items():
        text.append("━" * max(1, round(BAR * value / whole)), style=STYLES.get(name, "bright_black"))
    if parts:
        text.append("\n")
    words = [f"{name.replace('_', ' ')} {_ms(value)}" for name, value in parts.items()]
    if told_parts:
        words.insert(0, f"first token {_ms(told_parts['ttft_ms'])}")
    tokens = usage.get("completion_tokens", 0)
    if tokens > 1 and told_parts:
        words.append(f"{_ms(told_parts['tokens_ms'] / (tokens - 1))} a token")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    words.append(f"{usage.get('prompt_tokens', 0):,} prompt tokens, {cached:,} cached")
    words.append(f"{tokens:,} answered")
    text.append(" · ".join(words), style="dim")
    return text


def _ms(value: float) -> str:
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.1f} ms"
