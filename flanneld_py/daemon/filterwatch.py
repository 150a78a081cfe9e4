"""The thread that follows the packet filter: who touches our rules, and who drops what we let through."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_

import structlog

from flanneld_py.addresses import Family, IPAddress
from flanneld_py.core.acceptin import cure, missing
from flanneld_py.core.drops import Drop, Flow, find_drops
from flanneld_py.core.rules import Names, Wish, matching, own_rows, places
from flanneld_py.daemon.heartbeats import BEAT_EVERY
from flanneld_py.daemon.inbox import Inbox, Levels, Problem, boottime
from flanneld_py.daemon.target import Target
from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.drivers.nfruleset import NfRuleset
from flanneld_py.drivers.xtables import LegacyTables
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey, Chains

LEGACY_EVERY, NO_LEGACY_EVERY = 0.5, 3.0
"""Seconds between looks at the tables of legacy iptables, which tells nobody of a change; and between looks
whether somebody has made one, while there is none."""
GLANCE_EVERY = 0.2
"""Seconds between looks at our own rules while those of others are read."""
REPAIRED_WITHIN, REPAIR_STEP = 0.5, 0.05
"""Seconds that the reconciler gets to put our rules right, and between looks whether it has."""
REST, LONGEST_REST = 4, 0.8
"""How many times as long as a look took the next one waits, and seconds: some program may change thousands of
rules all the time, and ours are to be back within a second all the same."""
RETRY = 1.0
"""Seconds until the next look after one that failed."""


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
        self._ruleset = NfRuleset(between=self._glance_again)
        self._nft = NfReader()
        self._legacy = LegacyTables()
        self._log = structlog.get_logger().bind(part="filter")
        self._seen: tuple[int, bytes] | None = None
        self._chains: Chains = {}
        self._judged: object = None
        """Rules and flows that were judged last."""
        self._absent: tuple[str, ...] = ()
        """Chains that are to accept and are not there."""
        self._target: Target | None = None
        self._rows: dict[ChainKey, Chain] = {}
        """Ours, as they were at the last look or glance."""
        self._repaired = 0
        """Rows of rules that had been put right by then."""
        self._glanced: tuple[int, bytes] | None = None
        self._waited = 0.0
        """Seconds of the last look in which nothing was done."""
        self._glance_due = 0.0
        self._awaits_repair = False
        self._found_of: tuple[object, ...] = ()
        """What was looked through last."""
        self._compared: object = None
        """Rules and Networks that were compared last."""
        self._places: frozenset[ChainKey] | None = None
        self._failed = False

    def places(self) -> frozenset[ChainKey] | None:
        """All chains in which something of ours is or may come to be; None: not known yet."""
        return self._places

    def follow(self, target: Target) -> None:
        """Say what shall be from now on; called by the reconciler."""
        self._target = target

    def begin(self) -> None:
        """Look for the first time: before that it is not known which rules are to be."""
        self._look()

    def interrupt(self) -> None:
        """Make `run` look again, or see that it shall end."""
        self._ruleset.interrupt()

    def run(self) -> None:
        """Until the inbox stops."""
        while not self._inbox.stopped:
            self._inbox.beat()
            asked = boottime()
            self._ruleset.wait(self._wait)
            if self._inbox.stopped:
                return
            begun, self._waited = boottime(), 0.0
            self._look()
            took = boottime() - begun - self._waited
            # A look that nothing but the time has asked for has had its rest before.
            self._inbox.pause(min(REST * took - (begun - asked), LONGEST_REST))

    @property
    def _wait(self) -> float:
        if self._failed:
            return RETRY
        if not self._legacy.is_there:
            return BEAT_EVERY
        return LEGACY_EVERY if self._legacy.is_in_use else NO_LEGACY_EVERY

    def _look(self) -> None:
        try:
            now = self._let_repair(self._glance())
            if now != self._seen:
                self._chains = {**self._ruleset.chains(), **self._legacy.chains()}
                self._seen = now
        except KernelError as error:
            self._note_failure(error)
            return
        self._failed = False
        self._find(self._inbox.levels)
        networks = self._target.scope.networks if self._target else ()
        if (self._seen, networks) != self._compared:
            rows = self._rows_of(self._chains)
            self._compare(rows)
            # Known to the reconciler only after `accept_in`, else it might take away what is to stay.
            self._places = places(self._chains, self._names, {*rows, *(self._inbox.levels.accept_in or ())})
            self._compared = self._seen, networks

    def _glance(self) -> tuple[int, bytes]:
        """See whether our rules are as they were, without reading thousands of others; which ones there are.

        Raises:
            KernelError: they could not be read.
        """
        self._glance_due = boottime() + GLANCE_EVERY
        now = (self._nft.generation(), self._legacy.fingerprint())
        if now != self._glanced and self._places is not None:
            self._compare(self._rows_of({**self._nft.some(self._places), **self._legacy.some(self._places)}))
            self._glanced = now
        return now

    def _let_repair(self, now: tuple[int, bytes]) -> tuple[int, bytes]:
        """Wait for the reconciler, which needs the interpreter more than we do to read all rules."""
        begun = boottime()
        step = REPAIR_STEP
        while self._awaits_repair and boottime() < begun + REPAIRED_WITHIN and not self._inbox.stopped:
            paused = boottime()
            self._inbox.pause(step)
            glanced = boottime()
            self._waited += glanced - paused
            now = self._glance()
            step = max(REPAIR_STEP, REST * (boottime() - glanced))
        self._awaits_repair = False
        return now

    def _glance_again(self) -> None:
        """While thousands of rules are read."""
        if boottime() >= self._glance_due:
            self._glance()

    def _note_failure(self, error: KernelError) -> None:
        if not self._failed:
            self._log.warning("filter_unreadable", error=str(error))
        self._failed = True
        if self._inbox.levels.accept_in is None:
            # All but the rules can be set up; those are left as they are while nobody knows their places.
            self._inbox.offer(accept_in=())

    def _rows_of(self, chains: Chains) -> dict[ChainKey, Chain]:
        return own_rows(chains, self._names, self._target.scope.networks) if self._target else {}

    def _compare(self, rows: dict[ChainKey, Chain]) -> None:
        """Wake the reconciler when our rules are others than at the last look, and than they should be."""
        target, repaired = self._target, self._inbox.levels.report.repaired.get("rules", 0)
        if target is None or rows == target.state.rules:
            self._awaits_repair = False
        elif rows != self._rows or repaired != self._repaired:
            # The same as last time may have been repaired and undone in between.
            self._log.debug("rules_changed")
            self._inbox.kernel_changed()
            self._awaits_repair = True
        self._rows, self._repaired = rows, repaired

    def _find(self, levels: Levels) -> None:
        """Chains that are to accept our traffic, and those that drop it."""
        basis = (
            *(self._seen, self._target, levels.lease.own, levels.host),
            *(levels.accept_in, levels.filter_problem),
        )
        if self._found_of and all(map(is_, basis, self._found_of)):
            return
        self._found_of = basis
        accept_in = matching(self._wish.accept_in, self._chains)
        if accept_in != levels.accept_in:
            self._inbox.offer(accept_in=accept_in)
        absent = missing(self._wish.accept_in, self._chains)
        if absent != self._absent:
            self._absent = absent
            self._log.info("accept_in", chains=list(map(str, accept_in)), not_there_yet=list(absent))
        flows = tuple(self._flows(levels))
        if (self._seen, flows) == self._judged:
            return
        self._judged = (self._seen, flows)
        problem = self._problem(find_drops(self._chains, flows))
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
            yield Flow(f"from other hosts to {subnet}", peer, pod, dev, bridge, subnet)
            yield Flow(f"from {subnet} to other hosts", pod, peer, bridge, dev, subnet)

    def _problem(self, drops: tuple[Drop, ...]) -> Problem | None:
        if not drops:
            return None
        more = f" ({len(drops)} in all)" if len(drops) > 1 else ""
        fix = cure(drops, self._wish.accept_in, self._chains)
        # To cut off one container may be what an operator wants, and must not take the host out of service.
        code = "container-dropped" if all(drop.flow.single for drop in drops) else "traffic-dropped"
        return Problem(code, f"{drops[0]}{more}", fix)


def _address_of_others(target: Target, family: Family) -> IPAddress | None:
    subnets = (subnet for record in target.peers.accepted for subnet in record.subnets.values())
    return next((subnet.network_address for subnet in subnets if subnet.version == family), None)


def _device(target: Target, family: Family) -> str | None:
    """The device by which packets of other hosts come and go."""
    routes = target.state.routes.items()
    return next((route.nexthop.dev for subnet, route in routes if subnet.version == family), None)
