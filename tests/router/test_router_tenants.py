"""API keys and the tenants behind them: what is stored of a key, what a file may say, how keys are exchanged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from router.tenants import Keyring, new_key
from wire.errors import ConfigError


def written(path: Path, text: str) -> Keyring:
    path.write_text(text)
    return Keyring(path)


def test_a_key_opens_for_its_tenant_and_only_its_digest_is_stored(tmp_path: Path):
    key, stored = new_key()
    ring = written(tmp_path / "keys.toml", f'[tenants.acme]\nrequests_per_min = 5\nkeys = ["{stored}"]\n')
    tenant = ring.tenant_of(key)
    assert tenant is not None
    assert (tenant.tenant_id, tenant.requests_per_min, tenant.admin) == ("acme", 5, False)
    assert stored == f"{key.split('-')[1]}:{hashlib.sha256(key.encode()).hexdigest()}"
    assert len(key.split("-", 2)[2]) == 43  # 256 bits
    assert key not in (tmp_path / "keys.toml").read_text()


def test_no_two_keys_are_alike():
    assert len({new_key()[0] for _ in range(100)}) == 100


def test_a_wrong_key_opens_nothing(tmp_path: Path):
    key, stored = new_key()
    ring = written(tmp_path / "keys.toml", f'[tenants.acme]\nkeys = ["{stored}"]\n')
    other, _ = new_key()
    swapped = "-".join([*key.split("-", 2)[:2], other.split("-", 2)[2]])  # the right id before another secret
    for wrong in (
        other,
        swapped,
        key[:-1],
        key + "x",
        key.upper(),
        "",
        stored,
        stored.partition(":")[2],
        "Bearer " + key,
    ):
        assert ring.tenant_of(wrong) is None, wrong


def test_a_tenant_exchanges_its_key_while_both_work(tmp_path: Path):
    path = tmp_path / "keys.toml"
    (old, old_stored), (new, new_stored) = new_key(), new_key()
    ring = written(path, f'[tenants.acme]\nkeys = ["{old_stored}"]\n')
    path.write_text(f'[tenants.acme]\nkeys = ["{old_stored}", "{new_stored}"]\n')
    ring.refresh()
    assert ring.tenant_of(old) == ring.tenant_of(new) is not None
    path.write_text(f'[tenants.acme]\nkeys = ["{new_stored}"] # the old one is gone\n')
    ring.refresh()
    assert ring.tenant_of(old) is None
    assert ring.tenant_of(new) is not None
    # A file that breaks, or goes away, locks nobody out.
    for broken in ("[tenants", ""):
        path.write_text(broken)
        ring.refresh()
        assert ring.tenant_of(new) is not None
    path.unlink()
    ring.refresh()
    assert ring.tenant_of(new) is not None


BAD_FILES = {
    "not TOML": ("[tenants", "is not TOML"),
    "nobody": ("[tenants]\n", "tenants"),
    "no table": ("", "tenants"),
    "a key in the open": ('[tenants.a]\nkeys = ["{key}"]\n', "tenants.a.keys.0"),
    "three keys": ('[tenants.a]\nkeys = ["{stored}", "{stored}", "{stored}"]\n', "tenants.a.keys"),
    "no keys": ("[tenants.a]\nadmin = true\n", "tenants.a.keys"),
    "a name that is no id": ('[tenants."a:b"]\nkeys = []\n', "a:b"),
    "a limit below nothing": ("[tenants.a]\nstreams = -1\nkeys = []\n", "tenants.a.streams"),
    "a limit in words": ('[tenants.a]\nstreams = "5"\nkeys = []\n', "tenants.a.streams"),
    "a word we do not know": ("[tenants.a]\nstream = 1\nkeys = []\n", "tenants.a.stream"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_key_file_is_refused_without_telling_what_it_holds(tmp_path: Path, name: str):
    text, where = BAD_FILES[name]
    key, stored = new_key()
    with pytest.raises(ConfigError) as failure:
        written(tmp_path / "keys.toml", text.replace("{key}", key).replace("{stored}", stored))
    assert where in str(failure.value)
    assert str(tmp_path) in str(failure.value)
    assert key not in str(failure.value)


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="can not be read"):
        Keyring(tmp_path / "none.toml")
