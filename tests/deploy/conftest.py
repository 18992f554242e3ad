from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest


def gone(pid: int) -> bool:
    """Whether no process runs under this pid; one that ended but was not yet collected counts as gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait until a condition holds, at most 10 s."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it did not come true within 10 s"
            time.sleep(0.02)

    return wait


@pytest.fixture
def process_gone() -> Callable[[int], bool]:
    return gone
