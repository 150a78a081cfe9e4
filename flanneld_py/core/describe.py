"""Ops in the words of iproute2, for logs, status and `flannelctl plan`."""

from __future__ import annotations

from typing import Any

from flanneld_py.model import Op, Table, VxlanLink

NOUNS: dict[Table, str] = {
    "links": "link",
    "sysctls": "sysctl",
    "addrs": "address",
    "fdb": "fdb entry",
    "neighs": "neighbour",
    "nexthops": "nexthop",
    "routes": "route",
    "files": "file",
}


def describe(op: Op) -> str:
    """One line: `set route 10.5.3.0/24 via 10.5.3.0 dev flannel.1 onlink`."""
    return f"{op.verb} {NOUNS[op.table]} {_row(op.table, op.key, op.value)}"


def _row(table: Table, key: Any, value: Any) -> str:
    match table:
        case "links":
            return f"{key} {_link(value)}".strip()
        case "addrs":
            return f"{key[1]} dev {key[0]}"
        case "fdb":
            return f"{key[1]} dev {key[0]}" + (f" dst {value}" if value else "")
        case "neighs":
            return f"{key[1]} dev {key[0]}" + (f" lladdr {value}" if value else "")
        case "nexthops":
            return _hop(key)
        case "routes":
            return f"{key}" + (f" {_hop(value.nexthop)}" if value else "")
        case "sysctls":
            return f"{key}" + (f"={value}" if value is not None else "")
        case "files":
            return str(key)


def _hop(hop: Any) -> str:
    return f"via {hop.via} dev {hop.dev}" + (" onlink" if hop.onlink else "")


def _link(link: VxlanLink | None) -> str:
    if link is None:
        return ""
    return (
        f"type vxlan id {link.vni} dstport {link.port} dev {link.dev} local {link.local} "
        f"mtu {link.mtu} address {link.mac} {'up' if link.up else 'down'}"
    )
