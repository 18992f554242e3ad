"""`python -m chaos.apart MODEL INTO FAULT...`, as root in a network namespace of its own: the faults that need it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from chaos import report
from chaos.hosts import apart, raise_loopback
from chaos.network import Apart
from chaos.run import done, undisturbed
from chaos.table import FAULTS
from deploy.redis import EmbeddedRedis


def main(model: Path, into: str, names: list[str]) -> None:
    if into:
        report.into(Path(into))
    raise_loopback()
    faults = [fault for fault in FAULTS if fault.id in names]
    with (
        tempfile.TemporaryDirectory(prefix="penumbra-chaos-") as folder,
        EmbeddedRedis() as redis,
        apart(Path(folder), model, redis, prefill=2, decode=2) as hosts,
    ):
        done(Apart(hosts, undisturbed(hosts.url, model.name)), faults)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
