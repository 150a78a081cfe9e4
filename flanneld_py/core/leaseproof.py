"""Whose a record is: by what it proves to be this host's own, or what is left of another that is gone."""

from __future__ import annotations

from flanneld_py.core.leasedecision import Wish
from flanneld_py.core.records import encode
from flanneld_py.core.reservation import is_vacant
from flanneld_py.model import Host, Record, Snapshot


def near_us(snapshot: Snapshot, host: Host, wish: Wish) -> list[Record]:
    """Records that may be ours, bear our node id or name an address of ours: a few among ten thousand."""
    node_id, v4, v6 = host.node_id, wish.public_ips.v4, wish.public_ips.v6
    keys = {wish.last_key, *(record.key for record in (wish.held, wish.written) if record is not None)}
    leases = {wish.granted, wish.etcd_lease} - {0}
    return [
        record
        for record in snapshot.records.values()
        if record.node_id == node_id
        or record.etcd_lease in leases
        or record.key in keys
        or (v4 is not None and record.public_ips.v4 == v4)
        or (v6 is not None and record.public_ips.v6 == v6)
    ]


def is_ours(record: Record, host: Host, wish: Wish) -> bool:
    """Whether a record was written by this host, or for it: machines are cloned, ids and all."""
    if is_proven(record, wish):
        return True
    if record.node_id != host.node_id:
        return False
    if record.key in wish.silent or is_vacant(record, wish.backend_type):
        return True
    addresses = {*host.local_addresses, *host.external.public.values()}
    return any(ip in addresses for ip in record.public_ips.values())


def is_proven(record: Record, wish: Wish) -> bool:
    """Whether this machine wrote it, under whatever node id and address it had then."""
    written = wish.written
    if written is not None and record.key == written.key and encode(record) == encode(written):
        return True
    if wish.granted and record.etcd_lease == wish.granted:
        return True
    if wish.held is not None:
        return record.key == wish.held.key and record.mod_revision == wish.held.mod_revision
    if record.etcd_lease:
        return record.etcd_lease == wish.etcd_lease
    return record.key == wish.last_key and not wish.etcd_lease


def is_left(record: Record, wish: Wish) -> bool:
    """Whether it was another host's that counts as gone.

    Should that one come back, its etcd lease must not prove to it that the record is still its own.
    """
    return record.key in wish.silent and record.etcd_lease != 0 and not is_proven(record, wish)


def may_take(record: Record, wish: Wish) -> bool:
    """Whether a record that names our address, under another node id or none, may become ours."""
    return is_migrating(record, wish) or record.key in wish.silent


def is_migrating(record: Record, wish: Wish) -> bool:
    """Whether a record that names our address is what Go flannel left here, or reserved for that address."""
    known = not wish.previous or record.subnets in wish.previous
    return not record.node_id and (known or not record.etcd_lease)


def names_us(record: Record, wish: Wish) -> bool:
    """Whether it publishes an address of those that we publish."""
    v4, v6 = record.public_ips.v4, record.public_ips.v6
    return (v4 is not None and v4 == wish.public_ips.v4) or (v6 is not None and v6 == wish.public_ips.v6)
