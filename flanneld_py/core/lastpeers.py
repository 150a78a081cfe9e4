"""The peers of the last run: JSON with a checksum. Discardable; it never adds a peer of its own accord.

It serves to tell a peer that left from a registry that was wiped while no daemon ran here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from flanneld_py.core.records import SUBNETS_PREFIX, decode, encode
from flanneld_py.errors import RecordError
from flanneld_py.model import Entry, Record, Snapshot

FORMAT = 1


def render_peers(prefix: str, cluster_id: int, revision: int, peers: Iterable[Record]) -> str:
    """`revision` is that of the snapshot which made them peers, `cluster_id` that of its etcd."""
    body = {
        "format": FORMAT,
        "prefix": prefix,
        "cluster_id": cluster_id,
        "revision": revision,
        "peers": {record.key: encode(record) for record in peers},
    }
    return json.dumps({**body, "sha256": _checksum(body)}, indent=0) + "\n"


def parse_peers(text: str, prefix: str) -> Snapshot | None:
    """The peers as a snapshot; None for anything that is not a whole file of ours with this prefix."""
    try:
        body = json.loads(text)
        if body.pop("sha256") != _checksum(body) or (body["format"], body["prefix"]) != (FORMAT, prefix):
            return None
        numbers = body["cluster_id"], body["revision"]
        if not all(type(number) is int for number in numbers):
            return None
        records: dict[str, Record] = {}
        for key, value in body["peers"].items():
            with suppress(RecordError):
                records[key] = decode(Entry(f"{SUBNETS_PREFIX}{key}", value.encode()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Snapshot(numbers[1], numbers[0], records)


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
