"""The registry client under test, seen from outside: what its watch delivers, a line of JSON each.

    python -m tests.chaos.mirror PREFIX ENDPOINT…

`listing` has all keys at a revision; `changes` what came after it. After an error the watch is resumed, or
begun anew with a listing, as the daemon does it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings
from flanneld_py.errors import Compacted, Replaced, Unreachable

if TYPE_CHECKING:
    from flanneld_py.model import Entry

AGAIN = 0.2


def tell(kind: str, revision: int, entries: list[tuple[str, Entry | None]]) -> None:
    keys = [[key, entry.value.decode(errors="replace") if entry else None] for key, entry in entries]
    revisions = [entry.mod_revision if entry else 0 for _, entry in entries]
    item = {"kind": kind, "revision": revision, "keys": keys, "revisions": revisions}
    sys.stdout.write(json.dumps(item) + "\n")
    sys.stdout.flush()


def follow(registry: EtcdRegistry) -> None:
    """One listing, and the changes after it until history is gone."""
    listing = registry.list()
    tell("listing", listing.revision, [(entry.key, entry) for entry in listing.entries])
    revision, resumed = listing.revision, False
    while True:
        try:
            stream = registry.watch(revision, listing.cluster_id, resumed=resumed)
            try:
                for item in stream:
                    tell("changes", item.revision, [(change.key, change.entry) for change in item.changes])
                    revision = item.revision
            finally:
                stream.cancel()
        except Unreachable:
            time.sleep(AGAIN)
        resumed = True


def main(prefix: str, *endpoints: str) -> None:
    registry = EtcdRegistry(EtcdSettings(endpoints, prefix))
    while True:
        try:
            follow(registry)
        except (Compacted, Replaced):
            continue
        except Unreachable:
            time.sleep(AGAIN)


if __name__ == "__main__":
    main(*sys.argv[1:])
