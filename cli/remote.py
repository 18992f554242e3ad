"""A router somewhere, asked over HTTP: what the commands share that look at a cluster instead of running one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from wire.errors import ConfigError, PenumbraError

DEFAULT_URL = "http://127.0.0.1:8000"


def find_url(url: str | None, home: Path | None, cluster: str) -> str:
    """The router's URL: what was said, else that of the cluster that runs on this machine, else the usual port."""
    if url:
        return url.rstrip("/")
    from deploy.state import ClusterState, cluster_folder

    state = ClusterState.load(cluster_folder(home, cluster))
    return state.url if state is not None and state.supervisor.process() is not None else DEFAULT_URL


class Unreachable(PenumbraError):
    """The router does not answer, or not with what was asked for."""

    code = "unreachable"
    http_status = 503


@contextmanager
def client(url: str, api_key: str | None, timeout_s: float = 30.0) -> Iterator[httpx.Client]:
    """A client whose failures say who did not answer and what to do about it."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False) as ready:
            yield ready
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"--url {url}: {error}. Give one like {DEFAULT_URL}.") from error
    except httpx.HTTPStatusError as error:
        raise Unreachable(
            f"{error.request.url} answered {error.response.status_code}: {told(error.response)}"
        ) from error
    except httpx.HTTPError as error:
        raise Unreachable(
            f"The router at {url} does not answer: {error or type(error).__name__}. Start one with `penumbra up`, or "
            "say where it is with --url."
        ) from error


def get(router: httpx.Client, path: str) -> Any:
    answer = router.get(path)
    answer.raise_for_status()
    return answer.json()


def told(answer: httpx.Response) -> str:
    """What an error's body says."""
    try:
        answer.read()
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, httpx.HTTPError):
        return answer.reason_phrase
