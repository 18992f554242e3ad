"""The certificate of the router's public door: loaded once, and again whenever its files change.

Certificates are renewed while a router runs. Connections that are open keep theirs; new ones get the new one.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import structlog

from wire.errors import ConfigError

LOOK_S = 5.0
"""Between two looks at the files; a mounted Secret takes longer than that to be swapped."""

log = structlog.get_logger()


class Certificate:
    """A certificate chain and its key, in PEM files. `context` is what servers accept connections with."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Raises ConfigError naming the file that can not be used."""
        self._cert, self._key = cert, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._seen = self._state()
        try:
            self.context.load_cert_chain(cert, key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"{cert} and {key} are no certificate with its key: {error}. Both must be PEM, the certificate "
                "followed by those that signed it."
            ) from error

    async def follow(self) -> None:
        """Until cancelled. Files that do not fit together are reported and what was loaded before stays in use."""
        while True:
            await asyncio.sleep(LOOK_S)
            if (state := self._state()) == self._seen:
                continue
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)  # before ours is touched
                self.context.load_cert_chain(self._cert, self._key)
            except OSError as error:
                log.warning("certificate_unusable", path=str(self._cert), error=str(error))
            else:
                log.info("certificate_renewed", path=str(self._cert))
            self._seen = state

    def _state(self) -> tuple[object, ...]:
        """Moves when a file does."""
        found: list[object] = []
        for path in (self._cert, self._key):
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append(None)
        return tuple(found)
