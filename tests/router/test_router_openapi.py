"""The document of our routes against the routes: the same ones, and whatever a client makes of the document, the answer
is one that it tells of.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from router.openapi import OPERATIONS
from tests.router.conftest import MODEL, RouterStarter
from tests.router.fuzz_openapi import ENDLESS
from tests.router.test_router_stream import cluster, saying

ROOT = Path(__file__).parents[2]


@pytest_asyncio.fixture
async def client(start_router: RouterStarter, redis_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with cluster(start_router, redis_url, "openapi", saying("ok")) as (made, _, _):
        yield made


async def test_the_document_tells_of_every_route_and_of_no_other(client: httpx.AsyncClient):
    document = (await client.get("/openapi.json")).json()
    told = {(path, method) for path, item in document["paths"].items() for method in item}
    assert told == {(path, operation.method) for path, operation in OPERATIONS.items()}
    # Every told route is there, and takes only the method that is told.
    for path, method in told:
        if path in ENDLESS:
            continue
        path = path.replace("/page/{name}", "/page/main.js").replace("{name}", MODEL).replace("{stream_id}", "x")
        for other in ("GET", "POST", "PUT", "DELETE"):
            answer = await client.request(other, path)
            assert (answer.status_code == 405) == (other.lower() != method), (other, path)


@pytest.mark.timeout(900)
async def test_a_thousand_cases_made_from_the_document_get_answers_it_tells_of(client: httpx.AsyncClient):
    await check_fuzzed(client, 1_000)


@pytest.mark.long
async def test_ten_thousand_cases_made_from_the_document_get_answers_it_tells_of(client: httpx.AsyncClient):
    await check_fuzzed(client, 10_000)


async def check_fuzzed(client: httpx.AsyncClient, num_cases: int) -> None:
    # In a process of its own: making cases keeps the interpreter busy for seconds, and the router lives in this one.
    command = [sys.executable, "-m", "tests.router.fuzz_openapi", str(client.base_url), str(num_cases)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output[-4000:]
    seen = Counter({(path, status): count for path, status, count in json.loads(output.splitlines()[-1])})
    print(f"{sum(seen.values())} cases: {dict(sorted(Counter(status for _, status in seen.elements()).items()))}")
    assert sum(seen.values()) >= num_cases
    for path, operation in OPERATIONS.items():
        if path not in ENDLESS and "{" not in path:
            assert seen[path, 200] > 0, f"nothing good was asked of {path}"
        if operation.takes is not None:
            assert seen[path, 400] > 0, f"nothing bad was asked of {path}"
    # The routes still serve.
    answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})
    assert answer.status_code == 200
