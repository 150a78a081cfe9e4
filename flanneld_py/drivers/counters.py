"""Counters of the kernel's network stack (docs.kernel.org, networking/snmp_counter)."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from flanneld_py.errors import KernelError

PROC_NET = Path("/proc/self/net")
"""Of the thread's own network namespace."""
_UDP6_CHECKSUM_ERRORS = re.compile(rb"^Udp6InCsumErrors\s+(\d+)$", re.MULTILINE)


def read_udp_checksum_errors() -> int:
    """UdpInCsumErrors and Udp6InCsumErrors: packets dropped so far for a wrong UDP checksum.

    Raises:
        KernelError: they cannot be read.
    """
    try:
        names, values = (
            line.split()
            for line in (PROC_NET / "snmp").read_bytes().splitlines()
            if line.startswith(b"Udp: ")
        )
        return int(dict(zip(names, values, strict=True))[b"InCsumErrors"]) + _udp6_checksum_errors()
    except (OSError, ValueError, KeyError) as error:
        raise KernelError(f"cannot count UDP checksum errors: {error}") from error


def _udp6_checksum_errors() -> int:
    try:
        found = _UDP6_CHECKSUM_ERRORS.search((PROC_NET / "snmp6").read_bytes())
    except FileNotFoundError:
        return 0  # a kernel without IPv6
    return int(found[1]) if found else 0


class Traffic(NamedTuple):
    """What went through a device in one direction since it was made."""

    packets: int
    bytes: int
    drops: int


class LinkCounters(NamedTuple):
    """Of one device."""

    received: Traffic
    sent: Traffic


def read_link_counters(devices: Collection[str]) -> tuple[LinkCounters, ...]:
    """Counters of those devices that are there, of this network namespace; none when they cannot be read."""
    try:
        lines = (PROC_NET / "dev").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    # Two lines of headings; then `name: bytes packets errs drop fifo frame compressed multicast bytes …`.
    rows = (line.rpartition(":") for line in lines[2:])
    return tuple(_counters(values.split()) for name, _, values in rows if name.strip() in devices)


def _counters(values: list[str]) -> LinkCounters:
    numbers = [int(value) for value in values]
    received, sent = numbers[:8], numbers[8:]
    return LinkCounters(Traffic(received[1], received[0], received[3]), Traffic(sent[1], sent[0], sent[3]))
