"""What is to be thought of an earlier run's state, when there is no etcd to ask."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flanneld_py.addresses import PerFamily
from flanneld_py.core.duration import duration
from flanneld_py.daemon.aim import OF_PEERS
from flanneld_py.daemon.inbox import Problem, Recalled
from flanneld_py.model import Host, HostFacts, Op, Record, Table

NO_MAC = ("", "00:00:00:00:00:00")
"""Of interfaces that have none."""
FIX = "bring etcd back, which settles it; --on-lease-loss says what becomes of a subnet that another has"


def is_machine_of(mac: str, own: Record, facts: HostFacts) -> bool:
    """Whether a state was written here: machines are cloned, state directory and all.

    Args:
        mac: of the external interface of whoever wrote it.
        own: his record, which tells where that interface has none.
        facts: this host.
    """
    if mac not in NO_MAC:
        return mac in {link.mac for link in facts.links}
    held = {entry.address.ip for link in facts.links for entry in link.addresses}
    return any(ip in held for ip in own.public_ips.values())


def seconds_left(recalled: Recalled, unix_time: float) -> float | None:
    """Until etcd ends the lease, if nobody has renewed it since; None: never, or nobody knows.

    By the wall clock, as no other runs over a reboot; one that was turned back tells nothing.
    """
    if not recalled.own.ttl or unix_time < recalled.time:
        return None
    return recalled.time + recalled.own.ttl - unix_time


def doubts(recalled: Recalled, host: Host, unix_time: float) -> Problem | None:
    """Why the lease may not be ours any more, or peers not find us, if so.

    It is gone by all the same: peers send to whom their own registry names, so that a subnet used twice harms
    nobody but us, and mostly etcd was off together with its hosts.
    """
    own, reasons = recalled.own, []
    left = seconds_left(recalled, unix_time)
    if own.ttl and left is None:
        reasons.append(f"this host's clock is behind {recalled.of}, when it was last known to stand")
    if left is not None and left <= 0:
        reasons.append(
            f"the state is of {recalled.of}, and a lease stands for {duration(own.ttl)}, so another host may "
            "have its subnet by now unless etcd was down as well"
        )
    known, here = own.record.public_ips, host.external.public
    here = PerFamily(*(here.get(f) if known.get(f) is not None else None for f in (4, 6)))
    if known != here:
        told, now = (" and ".join(map(str, addresses.values())) for addresses in (known, here))
        reasons.append(f"peers know this host by {told}, and send there; it now has {now or 'none'}")
    if not reasons:
        return None
    return Problem("lease-unconfirmed", f"lease {own.record.key}: {'; '.join(reasons)}", FIX)


def is_withheld(op: Op, newer: Collection[tuple[Table, Any]]) -> bool:
    """Whether to leave it until etcd answers.

    What stands may be newer than the state, which is written some seconds later: so nothing that is in
    nobody's way is deleted, and no row of a peer replaced that was another one at the start (`newer`).
    """
    if op.verb == "del":
        return not (op.table == "links" and op.value is not None)  # else it is in the way of another link
    return op.table in OF_PEERS and (op.table, op.key) in newer
