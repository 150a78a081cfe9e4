"""What tests of the etcd driver do with it: watch, and note what came."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flanneld_py.errors import Unreachable
from flanneld_py.model import Changes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flanneld_py.drivers.etcd import EtcdRegistry, WatchStream


@contextmanager
def watching(registry: EtcdRegistry, revision: int | None = None) -> Iterator[WatchStream]:
    listing = registry.list()
    stream = registry.watch(listing.revision if revision is None else revision, listing.cluster_id)
    try:
        yield stream
    finally:
        stream.cancel()


def seen(items: Iterable[Changes]) -> list[tuple[str, bytes | None]]:
    return [(c.key, c.entry.value if c.entry else None) for item in items for c in item.changes]


@contextmanager
def following(registry: EtcdRegistry) -> Iterator[list[Changes]]:
    """What a caller does: watch, and after any failure watch again from where the last one came to.

    The first item stands for the listing.
    """
    listing = registry.list()
    items = [Changes(listing.revision, ())]
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            try:
                stream = registry.watch(items[-1].revision, listing.cluster_id)
                try:
                    items.extend(stream)
                finally:
                    stream.cancel()
            except Unreachable:
                over.wait(0.1)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield items
    finally:
        over.set()
        registry.close()
        thread.join(10)
    assert not thread.is_alive()
