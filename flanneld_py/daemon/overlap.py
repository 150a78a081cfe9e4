"""Whether the Network contains what this host needs outside the overlay: known once the own lease is."""

from __future__ import annotations

import threading
from collections.abc import Collection

import structlog

from flanneld_py.addresses import IPNetwork
from flanneld_py.core.configchange import outdated_bridges, overlaps_of_host
from flanneld_py.core.subnets import inside
from flanneld_py.daemon.inbox import Inbox, Levels, Problem
from flanneld_py.model import Host, NetworkConfig

FIX = "choose a Network that no host is part of (flannelctl config check), or renumber this host"


class OverlapWatch:
    """Offers `overlap_problem`. Any thread may call."""

    def __init__(self, inbox: Inbox, known: Collection[IPNetwork] = ()) -> None:
        """`known`: Networks of earlier runs."""
        self._inbox = inbox
        self._known = tuple(known)
        self._lock = threading.Lock()
        self._log = structlog.get_logger().bind(part="host")
        self._seen: tuple[object, ...] = ()

    def look(self) -> None:
        """Compare once, if something is other than the last time."""
        with self._lock:
            levels = self._inbox.levels
            seen = (levels.network, levels.host, levels.lease.own)
            if len(self._seen) == len(seen) and all(a is b for a, b in zip(seen, self._seen, strict=True)):
                return
            self._seen = seen
            problem, known = find_overlap(levels, self._known), levels.overlap_problem
            if problem == known:
                return
            self._inbox.offer(overlap_problem=problem)
            if problem is not None:
                self._log.warning(problem.code.replace("-", "_"), reason=problem.reason, fix=problem.fix)


def find_overlap(levels: Levels, known: Collection[IPNetwork] = ()) -> Problem | None:
    """What stands in the way, if anything does; `known`: Networks of earlier runs."""
    network, host, own = levels.network, levels.host, levels.lease.own
    # Before the lease is known the bridge's address cannot be told from a stranger's.
    if network is None or host is None or own is None:
        return None
    subnets = own.record.subnets.values()
    former = (*network.former, *known)
    reasons = list(overlaps_of_host(network.config, host, subnets, former))
    if reasons:
        more = f" ({len(reasons)} in all)" if len(reasons) > 1 else ""
        return Problem("config-overlaps-host", reasons[0] + more, FIX)
    return _bridge(network.config, host, subnets, former)


def _bridge(
    config: NetworkConfig, host: Host, own: tuple[IPNetwork, ...], former: Collection[IPNetwork]
) -> Problem | None:
    found = outdated_bridges(config, host, own, former)
    if not found:
        return None
    address, dev = min(found.items(), key=str)
    subnets = ", ".join(map(str, own))
    is_inside = any(inside(address, network) for network in config.networks)
    where = "inside the Network but" if is_inside else "of a Network that is not in force any more,"
    return Problem(
        "bridge-outdated",
        f"{dev} has {address}, {where} outside this host's subnet {subnets}: "
        "containers on it are not reached",
        f"if {dev} is the containers' bridge, left from an earlier subnet, restart them (Docker: its daemon; "
        f"CNI: ip link delete {dev} when it is empty); else choose a Network that no host is part of",
    )
