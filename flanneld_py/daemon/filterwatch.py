"""The thread that follows the packet filter: who touches our rules, and who drops what we let through."""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from flanneld_py.core.drops import Drop, Flow, find_drops
from flanneld_py.core.rules import Names, Wish, matching, own_rows
from flanneld_py.daemon.heartbeats import BEAT_EVERY
from flanneld_py.daemon.inbox import Inbox, Levels, Problem, boottime
from flanneld_py.daemon.target import Target
from flanneld_py.drivers.nfmonitor import NfMonitor
from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.drivers.xtables import LegacyTables
from flanneld_py.errors import KernelError
from flanneld_py.model import Family, IPAddress
from flanneld_py.packetfilter import Chain, ChainKey, Chains

LEGACY_EVERY = 0.5
"""Seconds between looks at the tables of legacy iptables, which tells nobody of a change."""
REST, LONGEST_REST = 4, 0.8
"""How many times as long as a look took the next one waits, and seconds: some program may change thousands of
rules all the time, and ours are to be back within a second all the same."""
RETRY = 1.0
"""Seconds until the next look after one that failed."""
FIX = "let it pass there, or name one of its chains by --forward-accept-in"


class FilterWatch:
    """Offers `accept_in` and `filter_problem`, and counts up `kernel_changes`."""

    def __init__(self, inbox: Inbox, names: Names, wish: Wish) -> None:
        """Make sockets.

        Raises:
            KernelError: there are none to be had.
        """
        self._inbox = inbox
        self._names = names
        self._wish = wish
        if wish.accept_in:
            inbox.offer(accept_in=None)  # until we have looked: what stands there must not go
        self._monitor = NfMonitor()
        self._nft = NfReader()
        self._legacy = LegacyTables()
        self._log = structlog.get_logger().bind(part="filter")
        self._seen: tuple[int, bytes] | None = None
        self._chains: Chains = {}
        self._judged: object = None
        """Rules and flows that were judged last."""
        self._target: Target | None = None
        self._rows: dict[ChainKey, Chain] = {}
        """Ours, as they were at the last look."""
        self._failed = False

    def follow(self, target: Target) -> None:
        """Say what shall be from now on; called by the reconciler."""
        self._target = target

    def begin(self) -> None:
        """Look for the first time: before that it is not known which rules are to be."""
        self._look()

    def interrupt(self) -> None:
        """Make `run` look again, or see that it shall end."""
        self._monitor.interrupt()

    def run(self) -> None:
        """Until the inbox stops."""
        while not self._inbox.stopped:
            self._inbox.beat()
            self._monitor.wait(self._wait)
            if self._inbox.stopped:
                return
            begun = boottime()
            self._look()
            self._inbox.pause(min(REST * (boottime() - begun), LONGEST_REST))

    @property
    def _wait(self) -> float:
        if self._failed:
            return RETRY
        return LEGACY_EVERY if self._legacy.is_there else BEAT_EVERY

    def _look(self) -> None:
        try:
            now = (self._nft.generation(), self._legacy.fingerprint())
            if now != self._seen:
                self._chains = {**self._nft.chains(), **self._legacy.chains()}
                self._seen = now
        except KernelError as error:
            if not self._failed:
                self._log.warning("filter_unreadable", error=str(error))
            self._failed = True
            return
        self._failed = False
        self._compare()
        self._find(self._inbox.levels)

    def _compare(self) -> None:
        """Wake the reconciler when our rules are others than at the last look, and than they should be."""
        target = self._target
        if target is None:
            return
        rows = own_rows(self._chains, self._names, target.scope.networks)
        if rows not in (self._rows, target.state.rules):
            self._log.debug("rules_changed")
            self._inbox.kernel_changed()
        self._rows = rows

    def _find(self, levels: Levels) -> None:
        """Chains that are to accept our traffic, and those that drop it."""
        accept_in = matching(self._wish.accept_in, self._chains)
        if accept_in != levels.accept_in:
            self._inbox.offer(accept_in=accept_in)
        flows = tuple(self._flows(levels))
        if (self._seen, flows) == self._judged:
            return
        self._judged = (self._seen, flows)
        problem = _problem(find_drops(self._chains, flows))
        if problem != levels.filter_problem:
            if problem is not None:
                self._log.warning("traffic_dropped", reason=problem.reason, fix=problem.fix)
            else:
                self._log.info("traffic_passes")
            self._inbox.offer(filter_problem=problem)

    def _flows(self, levels: Levels) -> Iterator[Flow]:
        """What comes from other hosts to our pods, and what goes there."""
        target, own, host = self._target, levels.lease.own, levels.host
        if target is None or own is None or host is None:
            return
        for family, subnet in own.record.subnets.items():
            peer = _address_of_others(target, family)
            dev = _device(target, family)
            if peer is None or dev is None:
                continue
            pod = subnet.network_address
            bridge = next((name for ip, name in host.devices.items() if ip in subnet), None)
            yield Flow(f"from other hosts to {subnet}", peer, pod, dev, bridge)
            yield Flow(f"from {subnet} to other hosts", pod, peer, bridge, dev)


def _address_of_others(target: Target, family: Family) -> IPAddress | None:
    subnets = (subnet for record in target.peers.accepted for subnet in record.subnets.values())
    return next((subnet.network_address for subnet in subnets if subnet.version == family), None)


def _device(target: Target, family: Family) -> str | None:
    """The device by which packets of other hosts come and go."""
    routes = target.state.routes.items()
    return next((route.nexthop.dev for subnet, route in routes if subnet.version == family), None)


def _problem(drops: tuple[Drop, ...]) -> Problem | None:
    if not drops:
        return None
    more = f" ({len(drops)} in all)" if len(drops) > 1 else ""
    return Problem("traffic-dropped", f"{drops[0]}{more}", FIX)
