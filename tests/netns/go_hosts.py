"""Hosts of the lab that run Go flannel, as tests/gonode.py plays it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flanneld_py.lab import wait_for
from tests.netns.forwarded import forwarded

if TYPE_CHECKING:
    from flanneld_py.lab import Host
    from flanneld_py.lab.process import Process

COMMAND = (sys.executable, "-m", "tests.gonode")
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[2])}


def start_go(host: Host, *flags: str) -> Process:
    """Start it on a host; it has its lease and subnet.env when this returns."""
    before = host.subnet_file.stat().st_ino if host.subnet_file.exists() else 0
    process = host.spawn(
        "gonode", [*COMMAND, *host.flags, f"--iface={host.interface}", *flags], env=ENVIRONMENT
    )

    def written() -> bool:
        assert process.running, process.output()
        return host.subnet_file.exists() and host.subnet_file.stat().st_ino != before

    wait_for(written, 10, f"subnet.env of {host.name}", bool)
    return process


def start_fleet(host: Host, count: int) -> None:
    """Leases of many such hosts."""
    host.run([*COMMAND, *host.flags, f"--fleet={count}"], env=ENVIRONMENT, timeout=120)


def peers_of(host: Host, backend: str) -> dict[str, str]:
    """Subnet → gateway of each route that leads through one, whoever made it; of udp where packets go."""
    if backend == "udp":
        return forwarded(host, expected_peers(host, backend))
    routes = host.ip("-4", "route", "show", "table", "main")
    return {
        route["dst"]: route["gateway"] for route in routes if "gateway" in route and route["dst"] != "default"
    }


def expected_peers(host: Host, backend: str) -> dict[str, str]:
    """The same, as the registry demands it."""
    return {
        key.replace("-", "/"): key.partition("-")[0] if backend == "vxlan" else record["PublicIP"]
        for key, record in host.etcd.leases().items()
        if record.get("PublicIP", host.address) != host.address
    }


def wait_peers(host: Host, backend: str, timeout: float = 10) -> None:
    expected = expected_peers(host, backend)
    wait_for(
        lambda: peers_of(host, backend),
        timeout,
        f"peers of {host.name}",
        lambda found: found == expected,
        0.05,
    )
