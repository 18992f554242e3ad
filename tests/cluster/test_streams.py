"""Two routers and an answer that outlives its client and its router: taken up again elsewhere, not a byte lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.local_cluster import local_cluster


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(id, data) of each whole event; the id is that of the last event that had one."""
    found, last = [], ""
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        last = fields.get("id", last)
        if "data" in fields and fields["data"] != "[DONE]":
            found.append((last, json.loads(fields["data"])))
    return found


def text_of(told: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(choice["text"] for _, data in told for choice in data["choices"])


@pytest.mark.timeout(400)
def test_any_router_goes_on_with_an_answer_whose_client_left(model: Path, tmp_path: Path) -> None:
    body = {
        **{"model": model.name, "prompt": "once upon", "max_tokens": 400, "seed": 5, "ignore_eos": True},
        **{"stream": True, "stream_options": {"include_usage": True}},
    }
    with local_cluster(tmp_path / "home", model, "--routers", "2") as cluster:
        state = json.loads((cluster.folder / "state.json").read_text())
        here, there = state["urls"]
        expected = httpx.post(f"{here}/v1/completions", json=body, timeout=120)
        whole = text_of(events(expected.text))

        headers = {"idempotency-key": "story-1", "x-penumbra-resume": "60"}
        heard = ""
        with httpx.stream("POST", f"{here}/v1/completions", json=body, headers=headers, timeout=120) as answer:
            for piece in answer.iter_text():
                heard += piece
                if len(events(heard)) >= 3:
                    break
        begun = events(heard)
        stream = begun[-1][0]
        assert stream

        # The rest from the other router: the same answer, as if nothing had been.
        rest = httpx.get(f"{there}/v1/streams/{stream}", timeout=120)
        assert rest.status_code == 200
        assert rest.text.endswith("data: [DONE]\n\n")
        assert text_of(begun) + text_of(events(rest.text)) == whole
        names = {data["id"] for _, data in (*begun, *events(rest.text))}
        assert len(names) == 1
        usage = events(rest.text)[-1][1]["usage"]
        assert usage["completion_tokens"] == 400

        # With its key alone, all of it.
        again = httpx.post(f"{there}/v1/completions", json=body, headers=headers, timeout=120)
        assert text_of(events(again.text)) == whole
        assert {data["id"] for _, data in events(again.text)} == names
        assert httpx.get(f"{there}/v1/streams/{stream[:-4]}AAAA", timeout=30).status_code == 404

        # Its router gone, too; the cluster ends when a process of its own dies, so it is only frozen.
        headers["idempotency-key"] = "story-2"
        with httpx.stream("POST", f"{here}/v1/completions", json=body, headers=headers, timeout=120) as answer:
            heard = ""
            for piece in answer.iter_text():
                heard += piece
                if len(events(heard)) >= 3:
                    break
            os.kill(cluster.pid("router"), signal.SIGSTOP)
            try:
                begun = events(heard)
                rest = httpx.get(f"{there}/v1/streams/{begun[-1][0]}", timeout=120)
                assert text_of(begun) + text_of(events(rest.text)) == whole
            finally:
                os.kill(cluster.pid("router"), signal.SIGCONT)
