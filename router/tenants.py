"""Who asks: API keys, which are stored as digests only, and what the tenant behind each may do.

A file names the tenants. It is read again when it changes, so that a key is added or taken back without a restart:

    [tenants.acme]
    models = ["deepseek-v4-flash"]      # none named: all
    requests_per_min = 600              # 0, the default: no limit; the same for the next two
    tokens_per_min = 2_000_000          # of prompts, and of answers as far as they were asked for
    streams = 32                        # requests at once
    priority = 0                        # the best its requests may ask for; lower goes first
    weight = 1.0                        # its part of a crowded queue
    admin = false                       # whether it may look at workers, metrics and the fleet
    keys = ["3f9a1c2b:9f86d081884c7d65..."]   # what `penumbra key` prints

A key is 256 random bits, so that a plain SHA-256 of it can not be guessed from.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from wire.errors import ConfigError
from wire.prefix import DEFAULT_TENANT

KEY_MARK = "pn"
KEY = re.compile(KEY_MARK + r"-([0-9a-f]{8})-[A-Za-z0-9_-]{43}")

LIVE_KEYS = 2
"""Of one tenant at once: the old one works until its clients have the new one."""

TenantId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
StoredKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}:[0-9a-f]{64}$")]

log = structlog.get_logger()


class _TenantRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    models: list[Annotated[str, StringConstraints(min_length=1)]] = []
    requests_per_min: int = Field(default=0, ge=0)
    tokens_per_min: int = Field(default=0, ge=0)
    streams: int = Field(default=0, ge=0)
    priority: int = Field(default=0, ge=-1000, le=1000)
    weight: float = Field(default=1.0, gt=0, le=1000)
    admin: bool = False
    keys: list[StoredKey] = Field(max_length=LIVE_KEYS)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tenants: dict[TenantId, _TenantRow] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One party that pays for itself. Limits are per minute over all routers; 0 is none."""

    tenant_id: str
    models: frozenset[str] = frozenset()  # empty: all
    requests_per_min: int = 0
    tokens_per_min: int = 0
    streams: int = 0
    priority: int = 0
    weight: float = 1.0
    admin: bool = False

    @property
    def limited(self) -> bool:
        return bool(self.requests_per_min or self.tokens_per_min or self.streams)

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models


ANYONE = Tenant(tenant_id=DEFAULT_TENANT, admin=True)
"""Who asks where no keys are configured."""


def new_key() -> tuple[str, str]:
    """A fresh API key, and what to store of it."""
    key_id = secrets.token_hex(4)
    key = f"{KEY_MARK}-{key_id}-{base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip('=')}"
    return key, f"{key_id}:{_digest(key)}"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keyring:
    """The tenants of a file, by their keys."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError naming what is wrong with the file."""
        self._path = path
        self._stamp = _stamp(path)
        self._keys = _read(path)

    def tenant_of(self, key: str) -> Tenant | None:
        """Whose key this is. Takes no longer for a nearly right key than for a wrong one."""
        found = KEY.fullmatch(key)
        candidates = self._keys.get(found[1], ()) if found is not None else ()
        digest, owner = _digest(key), None
        for stored, tenant in candidates:
            if hmac.compare_digest(stored, digest):
                owner = tenant
        return owner

    def refresh(self) -> None:
        """Read the file again if it has changed. One that can not be used changes nothing, and the log says so."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
        except ConfigError as error:
            log.error("keys_not_read", path=str(self._path), error=str(error))
        else:
            log.info("keys_read", path=str(self._path), num_keys=sum(map(len, self._keys.values())))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> Mapping[str, tuple[tuple[str, Tenant], ...]]:
    """Key id -> the digests and tenants of the keys with that id."""
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"The key file {path} can not be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"The key file {path} is not TOML in UTF-8: {error}.") from error
    try:
        rows = _File.model_validate(data).tenants
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        # Not the value: it may be a key that somebody pasted where its digest belongs.
        raise ConfigError(f"The key file {path}, {where}: {first['msg']}.") from None
    keys: dict[str, tuple[tuple[str, Tenant], ...]] = {}
    for tenant_id, row in rows.items():
        tenant = Tenant(
            tenant_id=tenant_id,
            models=frozenset(row.models),
            **row.model_dump(exclude={"models", "keys"}),
        )
        for stored in row.keys:
            key_id, _, digest = stored.partition(":")
            keys[key_id] = (*keys.get(key_id, ()), (digest, tenant))
    return keys
