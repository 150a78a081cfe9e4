"""The thread that follows the host: which interface carries the overlay, and who touches what is ours."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from flanneld_py.core import ifselect
from flanneld_py.core.pace import TokenBucket
from flanneld_py.daemon.inbox import Inbox, Problem, boottime
from flanneld_py.daemon.target import Target
from flanneld_py.drivers.kernel import read_host
from flanneld_py.drivers.monitor import Heard, Monitor
from flanneld_py.errors import FlanneldError, HostError, HostNotReady, KernelError
from flanneld_py.model import Family, Host, HostFacts

BURST, PER_SECOND = 10, 5.0
"""Of readings of the host: some program may change a link at line rate."""
RETRY = 1.0
"""Seconds until the host is read again after that has failed."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the operator said about this host."""

    node_id: str
    prefix: str
    families: tuple[Family, ...] = (4,)
    iface: tuple[str, ...] = ()
    public_ip: str = ""


def host_of(facts: HostFacts, wanted: Wanted) -> Host:
    """This host as the decisions see it.

    Raises:
        HostError: no interface fits.
    """
    external = ifselect.select(
        facts, families=wanted.families, iface=wanted.iface, public_ip=wanted.public_ip
    )
    own = {link.name for link in facts.links if link.kind == "vxlan"}
    foreign = [
        entry.address
        for link in facts.links
        if link.name not in own
        for entry in link.addresses
        if entry.scope == "global"
    ]
    return Host(
        node_id=wanted.node_id,
        prefix=wanted.prefix,
        external=external,
        local_addresses=frozenset(address.ip for address in foreign),
        local_networks=tuple(dict.fromkeys(address.network for address in foreign)),
        macs={link.name: link.mac for link in facts.links if link.kind == "vxlan"},
        ipv6=facts.ipv6,
    )


def follow(monitor: Monitor, target: Target) -> None:
    """Tell the monitor what concerns us, so that ordinary traffic on the host wakes nobody."""
    monitor.follow(target.state, target.scope)


class HostWatch:
    """Offers `host`, and counts up `kernel_changes`."""

    def __init__(self, monitor: Monitor, wanted: Wanted, inbox: Inbox) -> None:
        self._monitor = monitor
        self._wanted = wanted
        self._inbox = inbox
        self._log = structlog.get_logger().bind(part="host")
        self._bucket = TokenBucket(BURST, PER_SECOND, boottime())
        self._must_reread = False

    def read(self) -> None:
        """Read the host once and offer it.

        Raises:
            HostError: no interface fits.
        """
        host = host_of(read_host(), self._wanted)
        last = self._inbox.levels.host
        if host == last and self._inbox.levels.host_problem is None:
            return
        if last is None or host.external != last.external:
            self._log.info(
                "external_interface",
                name=host.external.name,
                mtu=host.external.mtu,
                addresses=[str(ip) for ip in host.external.addresses.values()],
                public=[str(ip) for ip in host.external.public.values()],
            )
        self._inbox.offer(host=host, host_problem=None)

    def begin(self) -> None:
        """Read the host for the first time.

        Raises:
            HostError: no interface fits, and none will by waiting.
        """
        try:
            self.read()
        except HostNotReady as error:
            self._problem(error, "it is waited for; or set --iface")

    def run(self) -> None:
        """Until the monitor is closed."""
        while not self._inbox.stopped:
            heard = self._monitor.wait(RETRY if self._must_reread else None)
            if not self._inbox.stopped:
                self._take(heard or Heard())

    def _take(self, heard: Heard) -> None:
        if heard.overflow or heard.host or heard.links or self._must_reread:
            # What is said meanwhile is heard as one.
            self._inbox.pause(self._bucket.take(boottime()))
            self._reread()
        if heard.overflow or heard.ours or heard.links & self._inbox.levels.report.devices:
            self._log.debug("kernel_changed", links=sorted(heard.links), overflow=heard.overflow)
            self._inbox.kernel_changed()

    def _reread(self) -> None:
        """A host that lost its interface keeps what it has; the last known facts stay in force."""
        self._must_reread = False
        try:
            self.read()
        except HostError as error:
            self._problem(error, "bring the interface back, or set --iface")
        except KernelError as error:
            # Nothing need happen on the host that would tell us when to look again.
            self._must_reread = True
            self._problem(error, "wait a little, as it is tried again every second")

    def _problem(self, error: FlanneldError, fix: str) -> None:
        problem = Problem("host-interface", str(error), fix)
        if problem != self._inbox.levels.host_problem:
            self._log.warning("host_interface", reason=str(error))
            self._inbox.offer(host_problem=problem)
