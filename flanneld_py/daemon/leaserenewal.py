"""One renewal of an etcd lease, counted."""

from __future__ import annotations

from flanneld_py.daemon.counts import Counts
from flanneld_py.drivers.etcd import EtcdRegistry
from flanneld_py.errors import RegistryError


def renew(registry: EtcdRegistry, lease: int, counts: Counts) -> bool:
    """Whether the lease lives on; False: it has ended.

    Raises:
        RegistryError: nobody knows.
    """
    try:
        alive = registry.keep_alive(lease) > 0
    except RegistryError:
        counts.add("lease_renewals", "failed")
        raise
    counts.add("lease_renewals", "ok" if alive else "expired")
    return alive
