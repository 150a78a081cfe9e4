"""What survives a restart: JSON with a checksum. Discardable; it never overrides the registry."""

from __future__ import annotations

import hashlib
import json
from ipaddress import ip_network
from typing import Any

from msgspec import Struct, field

from flanneld_py.addresses import IPNetwork, PerFamily, Subnets
from flanneld_py.core import gojson

FORMAT = 1
LATEST = 1 << 40
"""Seconds since 1970, in 36,000 years; JSON may say Infinity and NaN."""


class SavedState(Struct, frozen=True):
    """The last run's lease and Networks, so that a fresh process knows what is ours."""

    prefix: str
    node_id: str
    networks: tuple[IPNetwork, ...] = ()
    subnets: Subnets = field(default_factory=PerFamily)
    etcd_lease: int = 0
    mac: str = ""
    """Of the external interface: a copy of this file on another machine proves nothing there."""
    mac_seed: str = ""
    """What a VTEP MAC is made from when another host has the one made from the node id."""
    put_due: float = 0.0
    """When the record is to be written again for Go flannel's sake, in seconds since 1970; 0: not at all."""


def render_state(state: SavedState) -> str:
    body = {
        "format": FORMAT,
        "prefix": state.prefix,
        "node_id": state.node_id,
        "networks": [str(net) for net in state.networks],
        "subnets": [str(net) for net in state.subnets.values()],
        "etcd_lease": state.etcd_lease,
        "mac": state.mac,
        "mac_seed": state.mac_seed,
        "put_due": state.put_due,
    }
    return json.dumps({**body, "sha256": _checksum(body)}, indent=1) + "\n"


def parse_state(text: str) -> SavedState | None:
    """None for anything that is not a whole file of ours: it is then as if there were none."""
    try:
        body = json.loads(text)
        if body.pop("sha256") != _checksum(body) or body["format"] != FORMAT:
            return None
        if not _has_our_types(body):
            return None
        subnets = [ip_network(net) for net in body["subnets"]]
        return SavedState(
            prefix=body["prefix"],
            node_id=body["node_id"],
            networks=tuple(ip_network(net) for net in body["networks"]),
            subnets=PerFamily(
                v4=next((net for net in subnets if net.version == 4), None),
                v6=next((net for net in subnets if net.version == 6), None),
            ),
            etcd_lease=body["etcd_lease"],
            mac=body["mac"],
            mac_seed=body.get("mac_seed", ""),
            put_due=body.get("put_due", 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def why_unusable(text: str) -> str:
    """Why `parse_state` makes nothing of it, as it continues "it …"."""
    try:
        found = json.loads(text)["format"]
        shown = gojson.show(found)
    except (ValueError, LookupError, TypeError, RecursionError):
        return "is damaged, cut off, or none of ours"
    if found != FORMAT:
        return f"is of format {shown}, expected {FORMAT}"
    return "is not as it was written: its checksum differs"


def _has_our_types(body: dict[str, Any]) -> bool:
    """A right checksum is no proof: anybody can make one, and `ip_network` also takes numbers."""
    texts = [body["prefix"], body["node_id"], body["mac"], body.get("mac_seed", "")]
    if not all(isinstance(text, str) for text in (*texts, *body["networks"], *body["subnets"])):
        return False
    "".join(texts).encode()  # raises ValueError for half a character, which later would be an error elsewhere
    lease, due = body["etcd_lease"], body.get("put_due", 0.0)
    return type(lease) is int and abs(lease) < 1 << 63 and type(due) in (int, float) and 0 <= due <= LATEST


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
