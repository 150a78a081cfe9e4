"""How many neighbours the kernel remembers (docs.kernel.org, networking/ip-sysctl: gc_thresh3)."""

from __future__ import annotations

from pathlib import Path

from flanneld_py.addresses import Family

GC_THRESH3 = "net.ipv{}.neigh.default.gc_thresh3"


def most_neighbours(family: Family) -> int | None:
    """Of the whole machine, without those set for good; None: it does not tell, as in a container."""
    try:
        return int(Path("/proc/sys", *GC_THRESH3.format(family).split(".")).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
