"""Counters of the kernel's network stack (docs.kernel.org, networking/snmp_counter)."""

from __future__ import annotations

from pathlib import Path

from flanneld_py.errors import KernelError

PROC_NET = Path("/proc/self/net")
"""Of the thread's own network namespace."""


def read_udp_checksum_errors() -> int:
    """UdpInCsumErrors and Udp6InCsumErrors: packets dropped so far for a wrong UDP checksum.

    Raises:
        KernelError: they cannot be read.
    """
    try:
        names, values = (
            line.split()
            for line in (PROC_NET / "snmp").read_text(encoding="ascii").splitlines()
            if line.startswith("Udp: ")
        )
        return int(dict(zip(names, values, strict=True))["InCsumErrors"]) + _udp6_checksum_errors()
    except (OSError, ValueError, KeyError) as error:
        raise KernelError(f"cannot count UDP checksum errors: {error}") from error


def _udp6_checksum_errors() -> int:
    try:
        lines = (PROC_NET / "snmp6").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return 0  # a kernel without IPv6
    return sum(int(value) for name, value in (line.split() for line in lines) if name == "Udp6InCsumErrors")
