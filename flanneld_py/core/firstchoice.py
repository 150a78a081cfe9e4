"""Whether the interface that reaches etcd carries the overlay, where nobody said which.

flannel takes the interface of the default route. On a host with several that is often the wrong one, while
etcd is mostly reached by the network the hosts share. A host that has carried the overlay keeps what it had.
"""

from __future__ import annotations

from flanneld_py.addresses import IPAddress
from flanneld_py.core.ifselect import is_loopback, is_overlay
from flanneld_py.model import HostFacts, LinkFacts, Snapshot


def is_undisputed(facts: HostFacts, registry: IPAddress) -> bool:
    """Whether the default route is what remains: etcd is on this host, or reached by the same interface."""
    way = facts.ways.get(registry)
    if way is None:
        return False
    link = _link(facts, way.dev)
    if link is None or is_loopback(link):
        return True
    return {way.dev} == set(facts.default_devices.values()) and not facts.default_devices_besides.values()


def prefers_registry(
    facts: HostFacts, registry: IPAddress, snapshot: Snapshot, *, node_id: str, last_mac: str, is_fresh: bool
) -> bool:
    """Whether the interface that reaches etcd is to be taken.

    It is on a fresh host, and where it carried the overlay in the last run of this daemon.

    Args:
        facts: the host, with the way to `registry`.
        registry: an address of etcd.
        snapshot: the records.
        node_id: of this host.
        last_mac: of the external interface in the last run; empty when it is not known.
        is_fresh: whether there was no subnet.env when the daemon started.
    """
    way = facts.ways.get(registry)
    link = _link(facts, way.dev) if way is not None else None
    if link is None or is_loopback(link) or is_overlay(link):
        return False
    # VLANs and members of a bond share a MAC, which then tells nothing.
    last = [other.name for other in facts.links if last_mac and other.mac == last_mac]
    if len(last) == 1:
        return last == [link.name]
    local = {held.address.ip: other.name for other in facts.links for held in other.addresses}
    carried = {
        (record.node_id == node_id, local[ip])
        for record in snapshot.records.values()
        for ip in record.public_ips.values()
        if ip in local
    }
    if carried:
        return (True, link.name) in carried
    return is_fresh and not any(map(is_overlay, facts.links))


def _link(facts: HostFacts, name: str) -> LinkFacts | None:
    return next((link for link in facts.links if link.name == name), None)
