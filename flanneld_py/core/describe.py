"""Ops in the words of iproute2, for logs, status and `flannelctl plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flanneld_py.datapath import (
    Endpoint,
    PumpSettings,
    TunLink,
)
from flanneld_py.model import (
    Link,
    NextHop,
    Op,
    Table,
)

NOUNS: dict[Table, str] = {
    "links": "link",
    "sysctls": "sysctl",
    "addrs": "address",
    "pumps": "data plane",
    "tunnel": "tunnel",
    "fdb": "fdb entry",
    "neighs": "neighbour",
    "nexthops": "nexthop",
    "routes": "route",
    "blackholes": "blackhole route",
    "offloads": "checksum offload",
    "rules": "rules",
    "files": "file",
}


WAITS = "waits for "
"""How the error of an op begins that was not tried, as another one has failed."""


def describe(op: Op) -> str:
    """One line: `set route 10.5.3.0/24 via 10.5.3.0 dev flannel.1 onlink`."""
    parts = (op.verb, NOUNS[op.table], *_ROWS[op.table](op.key, op.value if op.verb == "set" else None))
    return " ".join(part for part in parts if part)


def describe_key(table: Table, key: Any) -> str:
    """The row without its value: `nexthop via 192.0.2.2 dev eth0`."""
    name, _ = _ROWS[table](key, None)
    return f"{NOUNS[table]} {name}"


def _hop(hop: NextHop) -> str:
    via = "" if hop.via is None else f"via {hop.via} "
    return f"{via}dev {hop.dev}" + (" onlink" if hop.onlink else "")


def _pump(pump: PumpSettings) -> str:
    return f"{pump.plane} local {pump.address}:{pump.port} mtu {pump.mtu} source check {pump.source_check}"


def _endpoint(peer: Endpoint) -> str:
    return f"to {peer.address}:{peer.port}" + (" ipv6" if peer.ipv6 else "")


def _link(link: Link) -> str:
    if isinstance(link, TunLink):
        return f"type tun mtu {link.mtu} {'up' if link.up else 'down'}"
    return (
        f"type vxlan id {link.vni} dstport {link.port} dev {link.dev} local {link.local} "
        f"mtu {link.mtu} address {link.mac} {'up' if link.up else 'down'}"
    )


_ROWS: dict[Table, Callable[[Any, Any], tuple[str, str]]] = {
    "links": lambda name, link: (name, _link(link) if link else ""),
    "sysctls": lambda path, value: (path if value is None else f"{path}={value}", ""),
    "addrs": lambda key, _: (f"{key[1]} dev {key[0]}", ""),
    "pumps": lambda dev, pump: (dev, _pump(pump) if pump else ""),
    "tunnel": lambda key, peer: (f"{key[1]} dev {key[0]}", _endpoint(peer) if peer else ""),
    "fdb": lambda key, public: (f"{key[1]} dev {key[0]}", f"dst {public}" if public else ""),
    "neighs": lambda key, mac: (f"{key[1]} dev {key[0]}", f"lladdr {mac}" if mac else ""),
    "nexthops": lambda hop, _: (_hop(hop), ""),
    "routes": lambda subnet, route: (str(subnet), _hop(route.nexthop) if route else ""),
    "blackholes": lambda subnet, _: (str(subnet), ""),
    "offloads": lambda dev, on: (f"dev {dev}", "" if on is None else "on" if on else "off"),
    "rules": lambda key, chain: (f"of {key}", f"({len(chain.rules)})" if chain else ""),
    "files": lambda path, _: (path, ""),
}
"""Of each table: the row's name, and with a value what it shall be."""
