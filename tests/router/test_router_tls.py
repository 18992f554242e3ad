"""The public door over TLS, with certificates of a real authority."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from router.config import RouterConfig
from router.tls import Certificate
from tests.router.conftest import MODEL, RouterStarter
from wire.errors import ConfigError


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def issue(authority: trustme.CA, folder: Path) -> dict[str, Path]:
    """A certificate for this machine, and its key, in the two files a router is told of."""
    leaf = authority.issue_cert("127.0.0.1")
    leaf.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    return {"tls_cert_path": folder / "tls.crt", "tls_key_path": folder / "tls.key"}


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def serial(url: httpx.URL, authority: trustme.CA) -> str:
    """Of the certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection(url.host, url.port, ssl=trusting(authority))
    try:
        return str(writer.get_extra_info("peercert")["serialNumber"])
    finally:
        writer.close()
        await writer.wait_closed()


async def test_whoever_trusts_the_authority_is_served_and_everybody_else_is_not(
    start_router: RouterStarter, authority: trustme.CA, tmp_path: Path
) -> None:
    async with start_router(namespace="tls", **issue(authority, tmp_path)) as plain:
        assert plain.base_url.scheme == "https"
        async with httpx.AsyncClient(base_url=plain.base_url, verify=trusting(authority)) as client:
            answer = await client.get("/v1/models")
            assert [one["id"] for one in answer.json()["data"]] == [MODEL]
            # Without workers: an error of ours, through the whole stack.
            refused = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hello"})
            assert refused.status_code == 503
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await plain.get("/v1/models")
        with pytest.raises(httpx.HTTPError):
            await plain.get(f"http://{plain.base_url.netloc.decode()}/v1/models")


async def test_a_refusal_before_there_is_a_request_arrives_and_a_client_that_ends_its_side_is_let_go(
    start_router: RouterStarter, authority: trustme.CA, tmp_path: Path
) -> None:
    async with start_router(namespace="tls-refusal", **issue(authority, tmp_path)) as client:
        url = client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port, ssl=trusting(authority))
        writer.write(b"this is not HTTP\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"invalid_http" in answer
        writer.close()


async def test_a_renewed_certificate_is_shown_to_new_connections_and_a_broken_one_never(
    start_router: RouterStarter, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.tls.LOOK_S", 0.02)
    files = issue(authority, tmp_path)
    async with start_router(namespace="tls-renewed", **files) as client:
        first = await serial(client.base_url, authority)
        good = files["tls_key_path"].read_bytes()
        files["tls_key_path"].write_bytes(b"half of a ke")
        await asyncio.sleep(0.2)
        assert await serial(client.base_url, authority) == first
        files["tls_key_path"].write_bytes(good)
        issue(authority, tmp_path)
        async with asyncio.timeout(10):
            while await serial(client.base_url, authority) == first:
                pass


def test_half_a_pair_and_files_that_do_not_fit_are_refused(authority: trustme.CA, tmp_path: Path) -> None:
    files = issue(authority, tmp_path)
    with pytest.raises(ConfigError, match="certificate and its key"):
        RouterConfig(model=tmp_path, redis_url="redis://127.0.0.1", tls_cert_path=files["tls_cert_path"])
    other = tmp_path / "other"
    other.mkdir()
    stranger = issue(authority, other)
    with pytest.raises(ConfigError, match="no certificate with its key"):
        Certificate(files["tls_cert_path"], stranger["tls_key_path"])
    with pytest.raises(ConfigError, match="no certificate with its key"):
        Certificate(tmp_path / "absent", files["tls_key_path"])
