"""The thread that follows the host: which interface carries the overlay, and who touches what is ours."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.addresses import FAMILIES, Family
from flanneld_py.core import ifselect
from flanneld_py.core.ifselect import address_of
from flanneld_py.core.ownership import tun_name
from flanneld_py.core.pace import TokenBucket
from flanneld_py.daemon.checksums import ChecksumWatch
from flanneld_py.daemon.firstchoice import Before, FirstChoice
from flanneld_py.daemon.heartbeats import BEAT_EVERY
from flanneld_py.daemon.identity import Identity
from flanneld_py.daemon.inbox import Inbox, Problem, boottime
from flanneld_py.daemon.target import Target
from flanneld_py.drivers.kernel import read_host
from flanneld_py.drivers.links import device_name
from flanneld_py.drivers.monitor import Heard, Monitor
from flanneld_py.errors import FlanneldError, HostError, HostNotReady, KernelError
from flanneld_py.model import External, Host, HostFacts

BURST, PER_SECOND = 10, 5.0
"""Of readings of the host: some program may change a link at line rate."""
RETRY = 1.0
"""Seconds until the host is read again after that has failed."""


FIX = "put that right, which is noticed at once; or set --iface"


class Wanted(Struct, frozen=True):
    """What the operator said about this host."""

    identity: Identity
    prefix: str
    families: tuple[Family, ...] = ()
    """Those of the config in force; empty while it is not known: any that the host can offer."""
    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: str = ""
    public_ip: str = ""
    public_ipv6: str = ""
    endpoints: tuple[str, ...] = ()
    """URLs of etcd."""
    before: Before = field(default_factory=Before)

    @property
    def candidates(self) -> tuple[tuple[Family, ...], ...]:
        """The families to choose an interface for, in order of preference."""
        if self.families:
            return (self.families,)
        flags: tuple[tuple[Family, str], ...] = ((4, self.public_ip), (6, self.public_ipv6))
        published = [family for family, address in flags if address]
        return tuple((family,) for family in published or FAMILIES)

    @property
    def names_interface(self) -> bool:
        """Whether a flag tells which interface carries the overlay."""
        found_by = (self.iface, self.iface_regex, self.iface_can_reach, self.public_ip, self.public_ipv6)
        return any(found_by)


def host_of(facts: HostFacts, wanted: Wanted, choice: FirstChoice) -> Host:
    """This host as the decisions see it.

    Raises:
        HostError: no interface fits.
    """
    external = _external(facts, wanted, choice)
    own = {link.name for link in facts.links if ifselect.is_of_overlay(link)}
    foreign = {
        entry.address: link.name
        for link in facts.links
        if link.name not in own
        for entry in link.addresses
        if entry.scope == "global"
    }
    return Host(
        node_id=wanted.identity.node_id,
        mac_seed=wanted.identity.mac_seed,
        prefix=wanted.prefix,
        external=external,
        local_addresses=frozenset(address.ip for address in foreign),
        devices={address.ip: name for address, name in foreign.items()},
        bridges=frozenset(link.name for link in facts.links if link.kind == "bridge"),
        local_networks=tuple(dict.fromkeys(address.network for address in foreign)),
        macs={link.name: link.mac for link in facts.links if link.kind == "vxlan"},
        tun=tun_name(facts, wanted.prefix),
        ipv6=facts.ipv6,
        gateways=facts.gateways,
        onlink=facts.onlink.get(external.name, ()),
        registry=choice.literals,
    )


def _external(facts: HostFacts, wanted: Wanted, choice: FirstChoice) -> External:
    """The interface for the wanted families; not knowing them, the first that fits with any."""
    failures: list[HostError] = []
    for families in wanted.candidates:
        try:
            return ifselect.select(
                facts,
                families=families,
                iface=wanted.iface,
                iface_regex=wanted.iface_regex,
                can_reach=wanted.iface_can_reach,
                public_ip=wanted.public_ip,
                public_ipv6=wanted.public_ipv6,
                registry=choice.towards,
                last=choice.last,
            )
        except HostError as failure:
            failures.append(failure)
    # An address or a default route of either family may still come; IPv4 is what most want.
    may_come = any(isinstance(failure, HostNotReady) for failure in failures)
    raise (HostNotReady if may_come else HostError)(str(failures[0]))


def link_problem(facts: HostFacts, external: External) -> Problem | None:
    """Why the interface carries nothing, if so."""
    name = external.name
    link = next(link for link in facts.links if link.name == name)
    if not link.up:
        return Problem("host-interface", f"interface {name} is down", f"ip link set {name} up")
    if not link.carrier:
        return Problem("host-interface", f"interface {name} has no carrier", "see to its cable or its switch")
    return None


def follow(monitor: Monitor, target: Target) -> None:
    """Tell the monitor what concerns us, so that ordinary traffic on the host wakes nobody."""
    monitor.follow(target.state, target.scope)


class HostWatch:
    """Offers `host`, and counts up `kernel_changes`."""

    def __init__(
        self, monitor: Monitor, wanted: Wanted, inbox: Inbox, moved: Callable[[], None] = lambda: None
    ) -> None:
        """`moved` is called when connections that this host had may be lost."""
        self._moved = moved
        self._monitor = monitor
        self._wanted = wanted
        self._inbox = inbox
        self._log = structlog.get_logger().bind(part="host")
        self._bucket = TokenBucket(BURST, PER_SECOND, boottime())
        self._must_reread = False
        self._families: tuple[Family, ...] = ()
        """For which the host was read last."""
        self._node_id = ""
        """Which it bore then."""
        self._index = 0
        """Of the external interface."""
        self._checksums = ChecksumWatch()
        self._choice = FirstChoice(wanted.endpoints, wanted.before, is_asked=not wanted.names_interface)

    def read(self) -> None:
        """Read the host once and offer it.

        Raises:
            HostError: no interface fits.
        """
        self._families, self._node_id = self._families_in_force, self._wanted.identity.node_id
        last, last_problem = self._inbox.levels.host, self._inbox.levels.host_problem
        facts = ifselect.in_use_first(self._facts(), last.external.addresses.values() if last else ())
        wanted = replace(self._wanted, families=self._families)
        if not self._choice.is_decided and self._choice.last is None:
            self._wait_for_registry(facts, wanted)
            return
        host = host_of(facts, wanted, self._choice)
        host = replace(host, bad_checksums=self._checksums.problem is not None)
        problem = link_problem(facts, host.external)
        self._index = next(link.index for link in facts.links if link.name == host.external.name)
        if host == last and problem == last_problem:
            return
        back = last_problem is not None and problem is None
        if back or (last is not None and not last.local_addresses <= host.local_addresses):
            self._moved()
        if last is None or host.external != last.external:
            self._log.info(
                "external_interface",
                name=host.external.name,
                mtu=host.external.mtu,
                addresses=[str(ip) for ip in host.external.addresses.values()],
                public=[str(ip) for ip in host.external.public.values()],
                how=host.external.how,
            )
        if problem is not None and problem != last_problem:
            self._log.warning("host_interface", reason=problem.reason)
        self._inbox.offer(host=host, host_problem=problem)

    def _facts(self) -> HostFacts:
        """The host as it is, with the ways that its choice of an interface depends on."""
        levels = self._inbox.levels
        reach = address_of(self._wanted.iface_can_reach)
        asked = self._choice.ask(levels) | frozenset({reach} if reach is not None else ())
        self._monitor.ask(asked)
        facts = read_host(asked)
        self._choice.decide(facts, levels, self._node_id)
        return facts

    def _wait_for_registry(self, facts: HostFacts, wanted: Wanted) -> None:
        """Offer nothing yet, as the interface may be another than that of the default route.

        Raises:
            HostNotReady: there is no default route to use, either.
        """
        try:
            host_of(facts, wanted, self._choice)
        except HostError as error:
            raise HostNotReady(str(error)) from None
        if self._inbox.levels.host_problem is not None:
            self._inbox.offer(host_problem=None)

    @property
    def _families_in_force(self) -> tuple[Family, ...]:
        network = self._inbox.levels.network
        return network.config.families if network is not None else ()

    def begin(self) -> None:
        """Read the host for the first time.

        Raises:
            HostError: no interface fits, and none will by waiting.
        """
        try:
            self.read()
        except HostNotReady as error:
            self._problem(error, FIX)

    def run(self) -> None:
        """Until the monitor is closed."""
        while not self._inbox.stopped:
            self._inbox.beat()
            # With ten thousand peers we hear of as many FDB entries that were written by us.
            self._inbox.let_set_up()
            heard = self._monitor.wait(RETRY if self._must_reread else BEAT_EVERY)
            if not self._inbox.stopped:
                self._take(heard or Heard())

    @property
    def _watches_checksums(self) -> bool:
        network = self._inbox.levels.network
        return network is not None and network.backend.watches_checksums

    def _look_at_checksums(self) -> bool:
        """Whether what is known of them has changed."""
        known = self._inbox.levels.checksum_problem
        problem = self._checksums.look(wanted=self._watches_checksums)
        if problem is not known:
            self._inbox.offer(checksum_problem=problem)
        return problem is not known

    def _take(self, heard: Heard) -> None:
        other_config = self._families != self._families_in_force
        other_id = self._node_id != self._wanted.identity.node_id
        undecided = not self._choice.is_decided
        news = self._look_at_checksums() or other_config or other_id or undecided or self._must_reread
        if heard.overflow or heard.host or heard.links or news:
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
            self._follow_name()
            self._problem(error, FIX)
        except KernelError as error:
            # Nothing need happen on the host that would tell us when to look again.
            self._must_reread = True
            self._problem(error, "wait a little, as it is tried again every second")

    def _follow_name(self) -> None:
        """The interface in use may have been renamed, and what has its name now may be another."""
        host, name = self._inbox.levels.host, device_name(self._index)
        if host is not None and name not in ("", host.external.name):
            self._log.info("external_interface_renamed", name=name, before=host.external.name)
            self._inbox.offer(host=replace(host, external=replace(host.external, name=name)))

    def _problem(self, error: FlanneldError, fix: str) -> None:
        problem = Problem("host-interface", str(error), fix)
        if problem != self._inbox.levels.host_problem:
            self._log.warning("host_interface", reason=str(error))
            self._inbox.offer(host_problem=problem)
