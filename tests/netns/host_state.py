"""All that a daemon could have touched on a host, by iproute2 and from the disk, to be compared as a whole.

MASK is all that is left out: what the kernel or iproute2 changes while nobody does anything.
"""

from __future__ import annotations

import json
import re
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flanneld_py.lab import Host

VIEWS = {
    "links": ("ip", "-details", "-json", "link", "show"),
    "addresses": ("ip", "-json", "address", "show"),
    "routes": ("ip", "-details", "-json", "route", "show", "table", "all"),
    "routes6": ("ip", "-details", "-json", "-6", "route", "show", "table", "all"),
    "rules": ("ip", "-json", "rule", "show"),
    "nexthops": ("ip", "-details", "-json", "nexthop", "show"),
    "permanent neighbours": ("ip", "-json", "neigh", "show", "nud", "permanent"),
    "fdb": ("bridge", "-json", "fdb", "show"),
}
MASK = {
    "num_tx_queues": "follows the number of CPUs",
    "num_rx_queues": "follows the number of CPUs",
    "stats64": "counts packets",
    "valid_life_time": "seconds left of an address that the kernel gave itself",
    "preferred_life_time": "the same",
    "expires": "seconds left of a route",
    "age": "seconds since an entry was used",
    "used": "the same",
    "updated": "the same",
    "gc_timer": "a bridge's clock",
    "hello_timer": "the same",
    "tcn_timer": "the same",
    "topology_change_timer": "the same",
    "message_age_timer": "the clock of a bridge's port",
    "forward_delay_timer": "the same",
    "hold_timer": "the same",
}
"""Field → why it does not count."""
BY_ITSELF = ("fe80:", "ff00:", "33:33:")
"""Rows about these come and go with the kernel: link-local addresses, their routes, and multicast groups."""


def host_state(host: Host) -> dict[str, list[str]]:
    """Title → rows, sorted; a row is JSON text."""
    seen = {title: _rows(host.run(view)) for title, view in VIEWS.items()}
    rules = host.run(["nft", "list", "ruleset"])
    seen["packet filter"] = re.sub(r"packets \d+ bytes \d+", "", rules).splitlines()
    seen["files"] = _files(host)
    return seen


def changes(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """What differs, a line each; empty when the host is as it was."""
    return [
        f"{sign} {title}: {row}"
        for title in before
        for sign, rows, others in (("-", before, after), ("+", after, before))
        for row in rows[title]
        if row not in others[title]
    ]


def add_foreign_objects(host: Host) -> None:
    """What looks like the daemon's and is not."""
    host.ip_batch(
        [
            "link add flannel.9 address 0a:00:00:00:00:09 mtu 1400 type vxlan id 9 dstport 4789 dev eth0 "
            "local 192.0.2.1 nolearning",
            "link set flannel.9 alias flanneld-py:/another/prefix up",
            "address add 10.77.1.0/32 dev flannel.9",
            "route add 10.77.2.0/24 via 10.77.2.0 dev flannel.9 onlink",
            "neigh add 10.77.2.0 lladdr 0a:00:00:00:00:0a dev flannel.9 nud permanent",
            "nexthop add id 7 via 192.0.2.254 dev eth0 protocol 96",
            "route add 10.5.250.0/24 via 192.0.2.254 dev eth0 protocol static",
            "route add 172.20.0.0/16 via 192.0.2.254 dev eth0 protocol 96",
            "route add blackhole 10.5.251.0/24 metric 7",
        ]
    )
    host.run(["bridge", "fdb", "append", "0a:00:00:00:00:0a", "dev", "flannel.9", "dst", "192.0.2.9"])
    host.nft("table ip filter {\n chain FORWARD {\n type filter hook forward priority 0;\n }\n}\n")


def _rows(text: str) -> list[str]:
    found = json.loads(text) if text.strip() else []
    rows = [json.dumps(_masked(row), sort_keys=True) for row in found]
    return sorted(row for row in rows if not any(part in row for part in BY_ITSELF))


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(part) for key, part in value.items() if key not in MASK}
    if isinstance(value, list):
        # A link carries its addresses: the kernel's own do not make the whole link vanish from view.
        kept = [_masked(part) for part in value]
        return (
            [part for part in kept if not str(part.get("local", "")).startswith("fe80:")]
            if _dicts(kept)
            else kept
        )
    return value


def _dicts(parts: list[Any]) -> bool:
    return all(isinstance(part, dict) for part in parts)


def _files(host: Host) -> list[str]:
    """Path, mode and content of everything on the host's disk but the daemons' logs, which the tests make."""
    rows = []
    for path in sorted(host.directory.rglob("*")):
        if path.name.startswith("daemon-") or "pycache" in path.parts:
            continue
        mode = path.lstat().st_mode
        content = path.read_bytes().hex() if stat.S_ISREG(mode) else ""
        rows.append(f"{path.relative_to(host.directory)} {mode:o} {content}")
    return rows
