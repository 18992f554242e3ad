"""Requests made from a router's own OpenAPI document, good and bad ones, each answer checked against the document.

    python -m tests.router.fuzz_openapi URL NUM_CASES

The last line of the output is JSON: how often each path answered with each status.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import HypothesisDeprecationWarning
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ENDLESS = ("/fleet/events",)
"""Paths whose answer has no end."""


def fuzz(base_url: str, num_cases: int) -> Counter[tuple[str, int]]:
    """At least `num_cases` requests that follow the document or just do not, each checked. -> answers by status."""
    seen: Counter[tuple[str, int]] = Counter()
    document = httpx.get(f"{base_url}/openapi.json").json()
    model = httpx.get(f"{base_url}/v1/models").json()["data"][0]["id"]
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    each = -(-num_cases // (2 * len(posts)))
    for operation in operations:
        if operation in posts:
            probe(operation, GenerationMode.POSITIVE, base_url, model, each, seen)
            probe(operation, GenerationMode.NEGATIVE, base_url, model, each, seen)
        elif operation.path not in ENDLESS:
            probe(operation, GenerationMode.POSITIVE, base_url, model, 3, seen)
    return seen


def probe(
    operation: Any,
    mode: GenerationMode,
    base_url: str,
    model: str,
    num_cases: int,
    seen: Counter[tuple[str, int]],
) -> None:
    @settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            case.body["model"] = model  # or nearly all would only hear that there is no such model
        response = case.call(base_url=base_url, timeout=60)
        seen[operation.path, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    check()


if __name__ == "__main__":
    # It draws from `random` inside its strategies, which hypothesis would rather it did not.
    warnings.simplefilter("ignore", HypothesisDeprecationWarning)
    counts = fuzz(sys.argv[1], int(sys.argv[2]))
    print(json.dumps([[path, status, count] for (path, status), count in sorted(counts.items())]))
