"""What a Penumbra cluster tells of its pages while it is under load: `/workers` as it goes, `/metrics` in the end.

Another server has neither, and a router with keys may not show them; then there is nothing to see, and that is said.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import gevent

from loadtest.client import Server, Unanswered
from loadtest.record import Sample

STATES = ("free", "used", "cached", "quarantined")
BALANCE_S = 15.0
"""Everything that requests held is back by then."""

_PAGES = re.compile(r'^penumbra_pages\{page_class="(\w+)",state="(\w+)"\} (\S+)$', re.MULTILINE)


class Watch:
    def __init__(self, server: Server, clock: Callable[[], float]) -> None:
        self.samples: list[Sample] = []
        self._server, self._clock = server, clock

    def run(self, every_s: float) -> None:
        """Look at all workers every so often, until killed."""
        while True:
            at_s = self._clock()
            for worker in self._workers():
                self.samples.append(
                    Sample(
                        at_s=round(at_s, 3),
                        worker=worker["worker_id"],
                        role=worker["role"],
                        pages={state: worker[f"{state}_pages"] for state in STATES},
                        read_bytes=worker["read_bytes"],
                    )
                )
            gevent.sleep(every_s)

    def _workers(self) -> list[dict[str, Any]]:
        if not self._server.is_penumbra:
            return []
        try:
            found = self._server.get("/workers", timeout_s=10.0).get("workers")
        except Unanswered:
            return []
        return found if isinstance(found, list) else []

    def balance(self) -> tuple[bool | None, str]:
        """Whether, with nothing asked any more, every page is free or cached; -> that, and what was seen.

        Of each class of pages where workers show their `/metrics`, else of full pages alone. None: nothing was shown.
        """
        deadline = time.monotonic() + BALANCE_S
        while True:
            told = {worker["worker_id"]: self._books(worker) for worker in self._workers()}
            if not told:
                return None, ""
            held = [
                f"{name}: {count} {kind} pages {state}"
                for name, books in told.items()
                for kind, states in books.items()
                for state, count in states.items()
                if state in ("used", "quarantined") and count
            ]
            held += self._lost(told)
            if not held:
                lines = [
                    f"{name}: " + ", ".join(f"{kind} {_sum(states)}" for kind, states in books.items())
                    for name, books in told.items()
                ]
                return True, "; ".join(lines)
            if time.monotonic() > deadline:
                return False, "; ".join(held)
            gevent.sleep(0.5)

    def _lost(self, told: dict[str, dict[str, dict[str, int]]]) -> list[str]:
        """Workers whose pages in all states together are not as many as when they were first seen."""
        first: dict[str, int] = {}
        for sample in self.samples:
            first.setdefault(sample.worker, sum(sample.pages.values()))
        now = {name: sum(books.get("full", {}).values()) for name, books in told.items()}
        return [
            f"{name}: {first[name]} full pages have become {count}"
            for name, count in now.items()
            if name in first and first[name] != count
        ]

    def _books(self, worker: dict[str, Any]) -> dict[str, dict[str, int]]:
        """Class -> state -> pages."""
        try:
            text = self._server.text(f"http://{worker['http_address']}/metrics", timeout_s=10.0).decode()
        except Unanswered:
            return {"full": {state: worker[f"{state}_pages"] for state in STATES}}
        books: dict[str, dict[str, int]] = defaultdict(dict)
        for kind, state, count in _PAGES.findall(text):
            books[kind][state] = int(float(count))
        return books


def _sum(states: dict[str, int]) -> str:
    return " + ".join(f"{states.get(state, 0)} {state}" for state in ("free", "cached")) + f" = {sum(states.values())}"
