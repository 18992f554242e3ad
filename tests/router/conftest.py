"""A tokenizer's directory, a real registry, and a router on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe
import httpx
import pytest

from deploy.redis import EmbeddedRedis
from engine.model.tiny import tokenizer_json
from router.config import ModelFacts, RouterConfig
from router.process import serve
from router.text import ChatPrompt, Text

VOCAB_SIZE = 320
MAX_CONTEXT = 4096
BOS, EOS = 0, 1
MODEL = "nano"


def byte_ids(text: str) -> list[int]:
    """The tiny tokenizer has one id per byte, behind BOS, EOS and pad."""
    return [3 + byte for byte in text.encode()]


def convert_chat(text: Text, body: dict[str, Any]) -> ChatPrompt:
    return text.convert(text.read(recipe.ChatCompletionRequest, body))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the router reads of a checkpoint: no weights."""
    directory = tmp_path_factory.mktemp("checkpoint")
    config = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return directory


@pytest.fixture(scope="session")
def facts(model_dir: Path) -> ModelFacts:
    return ModelFacts.load(model_dir)


@pytest.fixture(scope="session")
def text(model_dir: Path, facts: ModelFacts) -> Iterator[Text]:
    with contextlib.closing(Text(model_dir, facts, [MODEL], thinking=False)) as made:
        yield made


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


RouterStarter = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(scope="session")
def start_router(model_dir: Path, redis_url: str) -> RouterStarter:
    """`async with start_router(namespace=..., **config) as client`: a router for the length of the block."""

    @asynccontextmanager
    async def start(**config: Any) -> AsyncIterator[httpx.AsyncClient]:
        settings = {
            "model": model_dir,
            "redis_url": redis_url,
            "served_model_names": (MODEL,),
            "port": 0,
            "registry_poll_s": 0.05,
            "shutdown_grace_s": 1.0,
        }
        config = RouterConfig(**(settings | config))
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve(config, on_ready=url.set_result))
        await asyncio.wait({serving, url}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        try:
            async with httpx.AsyncClient(base_url=await url, timeout=20) as client:
                yield client
        finally:
            serving.cancel()
            await asyncio.wait({serving})

    return start
