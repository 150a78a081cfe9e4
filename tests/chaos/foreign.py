"""What on each host is none of the daemon's business, and what of the host is compared before and after."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.netns.host_state import host_state

if TYPE_CHECKING:
    from flanneld_py.lab import Host

PORT = 7007
"""Of the probes, UDP."""
OBJECTS = (
    "link add other0 address 0a:00:00:00:01:01 type veth peer name other1",
    "link set other1 up",
    "link set other0 up",
    "address add 10.77.1.1/24 dev other0",
    "route add 10.77.2.0/24 via 10.77.1.2 dev other0 proto 96",
    "route add blackhole 10.77.3.0/24 metric 7",
    "neigh add 10.77.1.3 lladdr 0a:00:00:00:00:0a dev other0 nud permanent",
)
ORACLE_SEES = {"route 10.77.2.0/24": "via 10.77.1.2 dev other0 onlink=False proto 96"}
"""Of OBJECTS, among the rows of the kinds that the daemon makes."""
MARKS = ("other0", "other1", "10.77.")
_COUNTED = re.compile(r"packets (\d+) bytes \d+")
_OURS = re.compile(r"^table (?:ip|ip6|inet) flannel[^{]*\{.*?^\}", re.MULTILINE | re.DOTALL)


def rules(host: Host) -> str:
    """A firewall that counts probes which came from outside though they are for another host's pods."""
    astray = "\n".join(
        f'iifname != "cni0" udp dport {PORT} {family} daddr != {gateway.network} counter name astray'
        for gateway in host.gateways()
        for family in ("ip" if gateway.version == 4 else "ip6",)
    )
    return (
        "table inet operator {\n counter astray { }\n"
        f"chain prerouting {{\n type filter hook prerouting priority -300; policy accept;\n{astray}\n}}\n"
        "chain forward {\n type filter hook forward priority 10; policy accept;\n"
        "ip saddr 10.77.9.9 drop\n}\n}\n"
    )


def add_foreign(host: Host) -> None:
    """Once the host has its subnets."""
    host.ip_batch(OBJECTS)
    host.nft(rules(host))


def astray(host: Host) -> int:
    """Probes for others that have reached this host; 0 until its rules are loaded."""
    if "table inet operator" not in host.run(["nft", "list", "tables"]).splitlines():
        return 0
    told = host.run(["nft", "list", "counter", "inet", "operator", "astray"])
    found = _COUNTED.search(told)
    return int(found[1]) if found else 0


def foreign_rows(host: Host) -> list[str]:
    """What the host has of OBJECTS and `rules`, without counters."""
    state = host_state(host)
    rows = [
        f"{title}: {row}"
        for title, found in state.items()
        if title not in {"files", "packet filter"}
        for row in found
        if any(mark in row for mark in MARKS)
    ]
    listed = _COUNTED.sub("", host.run(["nft", "list", "table", "inet", "operator"]))
    return [*rows, *(f"packet filter: {line}" for line in listed.splitlines())]


def own_rules(host: Host) -> str:
    """The tables of flannel's names, without counters and handles."""
    return "\n".join(sorted(_OURS.findall(_COUNTED.sub("", host.run(["nft", "list", "ruleset"])))))
