"""All that a daemon could have touched on a host, by iproute2 and from the disk, to be compared as a whole.

MASK is all that is left out: what the kernel or iproute2 changes while nobody does anything.
"""

from __future__ import annotations

import json
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
    "gc_timer": "of a bridge's ageing",
}
"""Field → why it does not count."""
BY_ITSELF = ("fe80:", "ff00:", "33:33:")
"""Rows about these come and go with the kernel: link-local addresses, their routes, and multicast groups."""


def host_state(host: Host) -> dict[str, list[str]]:
    """Title → rows, sorted; a row is JSON text."""
    seen = {title: _rows(host.run(view)) for title, view in VIEWS.items()}
    seen["packet filter"] = host.run(["nft", "list", "ruleset"]).splitlines()
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
