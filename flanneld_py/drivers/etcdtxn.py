"""The parts of etcd's transactions: guards, and what is done when all of them hold. Part of the etcd driver.

Keys are whole ones, as etcd has them.
"""

from __future__ import annotations

from typing import Any

from flanneld_py.drivers import etcdrpc
from flanneld_py.drivers.etcdanswers import range_end


def absent(key: bytes) -> Any:
    """There is no such key."""
    return etcdrpc.Compare(key=key, target=etcdrpc.Compare.VERSION, version=0)


def unchanged(key: bytes, mod_revision: int) -> Any:
    """The key is still as it was at `mod_revision`."""
    return etcdrpc.Compare(key=key, target=etcdrpc.Compare.MOD, mod_revision=mod_revision)


def none_newer(folder: bytes, revision: int) -> Any:
    """No key of a folder (it ends in a slash) was written after `revision`; some may have been deleted."""
    return etcdrpc.Compare(
        key=folder,
        range_end=range_end(folder),
        target=etcdrpc.Compare.MOD,
        result=etcdrpc.Compare.LESS,
        mod_revision=revision + 1,
    )


def put(key: bytes, value: bytes, lease: int) -> Any:
    return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=value, lease=lease))


def detachment(key: bytes) -> Any:
    """A put that keeps the value, and takes the key out of its etcd lease."""
    return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, ignore_value=True))


def deletion(key: bytes) -> Any:
    return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key))


def look(key: bytes) -> Any:
    return etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key))
