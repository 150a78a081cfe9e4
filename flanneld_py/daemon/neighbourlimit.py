"""Whether the kernel can remember all hosts that are reached without a gateway; only dmesg would tell."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from flanneld_py.addresses import FAMILIES, Family
from flanneld_py.daemon.inbox import Inbox, Levels
from flanneld_py.daemon.recall import NO_MAC
from flanneld_py.drivers.neighbourtable import GC_THRESH3, most_neighbours
from flanneld_py.model import Record

Limit = Callable[[Family], int | None]


class NeighbourLimit:
    """Warns once, in the log: how much is enough depends on who talks to whom. Any thread may call."""

    def __init__(self, inbox: Inbox, limit: Limit = most_neighbours) -> None:
        self._inbox = inbox
        self._limit = limit
        self._lock = threading.Lock()
        self._seen: tuple[Record, ...] = ()
        self._told: set[Family] = set()
        self._log = structlog.get_logger().bind(part="host")

    def look(self) -> None:
        """See whether there are too many now."""
        with self._lock:
            levels = self._inbox.levels
            peers = levels.report.peers.accepted
            if peers is self._seen:
                return
            self._seen = peers
            for family in FAMILIES:
                limit = None if family in self._told else self._limit(family)
                if limit is None or len(peers) <= limit:
                    continue  # most of the time: they need not be looked through
                count = nearby(levels, family)
                if count > limit:
                    self._told.add(family)
                    name = GC_THRESH3.format(family)
                    self._log.warning(
                        "neighbours_limited",
                        reason=f"{name} is {limit}, and {count} hosts are reached without a gateway: packets "
                        "to some are lost when all are talked to at once",
                        fix=f"sysctl -w {name}={2 * count}, and the same in /etc/sysctl.d for the next boot",
                    )


def nearby(levels: Levels, family: Family) -> int:
    """How many peers are on a network that the external interface is connected to.

    By one without a MAC, as WireGuard's, IPv4 asks for nobody's (arp_constructor in net/ipv4/arp.c).
    """
    if levels.host is not None and levels.host.external.mac in NO_MAC:
        return 0
    networks = [net for net in levels.host.onlink if net.version == family] if levels.host else []
    publics = {record.public_ips.get(family) for record in levels.report.peers.accepted}
    return sum(1 for public in publics if public is not None and any(public in net for net in networks))
