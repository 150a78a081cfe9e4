"""Whether the kernel forwards packets between interfaces at all (docs.kernel.org, networking/ip-sysctl)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flanneld_py.addresses import Family

SYSCTLS: Mapping[Family, str] = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}

PATHS = {family: Path("/proc/sys", *name.split(".")) for family, name in SYSCTLS.items()}


def is_forwarding(family: Family) -> bool | None:
    """Of the thread's own network namespace; None: it cannot be read, as without IPv6."""
    try:
        content = PATHS[family].read_bytes()
    except OSError:
        return None
    return content.strip() != b"0"
