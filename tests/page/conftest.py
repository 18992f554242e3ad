from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.page.browser import browser as browser
from tests.page.thousand import served


@pytest.fixture(scope="session")
def thousand() -> Iterator[str]:
    with served(1000) as url:
        yield url
