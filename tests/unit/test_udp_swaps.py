"""A table that a packet thread has in use is not freed, however the two fall together."""

from __future__ import annotations

import subprocess
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from flanneld_py.udp.table import Here, Peer, pack
from tests.unit import packets
from tests.unit.packetcore import build

HERE = Here(packets.OWN, packets.TUN, packets.NETWORKS, 1472)


def table(count: int) -> bytes:
    return pack(
        HERE,
        [Peer(IPv4Address(0xC6120001 + n), (IPv4Network((0x0A800000 + n * 256, 24)),)) for n in range(count)],
    )


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_table_is_freed_while_it_is_in_use(tmp_path: Path, sanitizer: str) -> None:
    files = [tmp_path / "few", tmp_path / "many"]
    for file, count in zip(files, (3, 40), strict=True):
        file.write_bytes(table(count))
    # ThreadSanitizer needs the addresses that newer kernels may give to others
    argv = ["setarch", "--addr-no-randomize", str(build(f"swaps-{sanitizer}")), *map(str, files)]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    sent, received, unfreed = map(int, ran.stdout.split())
    assert min(sent, received) >= 100_000
    assert unfreed == 0
