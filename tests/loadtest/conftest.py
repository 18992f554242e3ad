from __future__ import annotations

from tests.page.browser import browser as browser
