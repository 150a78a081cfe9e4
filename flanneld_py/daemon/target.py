"""What a pass aims at: the pure part of reconciling, put together from core and the backend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.addresses import IPAddress, IPNetwork
from flanneld_py.core.admit import Peers
from flanneld_py.core.desired import desired, subnet_env
from flanneld_py.core.linger import WIPE_GRACE
from flanneld_py.core.rules import Tool, Wish, desired_rules, names_of
from flanneld_py.core.subnetchoice import is_compatible
from flanneld_py.daemon.inbox import Levels, Network
from flanneld_py.drivers.filtertools import Tools
from flanneld_py.errors import ConfigError, FlanneldError, HostError
from flanneld_py.model import Host, OwnLease, Record, Scope, Snapshot, State
from flanneld_py.packetfilter import Chain, ChainKey


class Settings(Struct, frozen=True):
    """What stays the same as long as the process lives."""

    prefix: str
    subnet_file: str
    wish: Wish = field(default_factory=Wish)
    """Which packet-filter rules there are to be."""
    tools: Tools = field(default_factory=Tools)
    """What writes them."""
    blackhole: bool = False
    """Whether packets to addresses of our own subnet that no pod has are to be dropped here."""
    known_networks: tuple[IPNetwork, ...] = ()
    """Networks of earlier runs: what lies inside them may be ours."""
    wipe_grace: float = WIPE_GRACE
    """Seconds that peers stay when many left the registry at once; 0: not longer than one alone."""


class Inputs(NamedTuple):
    """Everything the desired state is made of."""

    network: Network
    host: Host
    own: OwnLease
    snapshot: Snapshot
    accept_in: tuple[ChainKey, ...] = ()
    """Of the chains that are to accept the overlay's traffic those that are there."""


class Difference(NamedTuple):
    """What sets the state of a target apart from that of the one before it, which had the same devices."""

    since: State
    """That of the one before."""
    want: State
    """The same but for tables with rows of peers: these have only the rows that are new or other ones."""
    have: State
    """… and these only what was in their place, and the rows that are not wanted any more."""


class Target(NamedTuple):
    """The desired state, and what was decided on the way."""

    state: State
    peers: Peers
    mtu: int
    scope: Scope
    rules_by: str | None = None
    """The tool by which packet-filter rules are made; None: there are none of ours."""
    networks: tuple[IPNetwork, ...] = ()
    """Those of this run, in which rows may be made or have been."""

    devices: frozenset[str] = frozenset()
    """The devices that our rows hang on: our own, and host-gw's external interface."""
    differs: Difference | None = None
    """None: not known, from any other target."""


def inputs_of(levels: Levels, last: Inputs | None = None) -> Inputs | None:
    """None while a part is missing; nothing may be written then.

    Until the lease that a new config demands is held, the config of the `last` inputs stays in force, or all
    stays as it was found: nothing of ours goes before it is known what comes.
    """
    network, host, own, snapshot = levels.network, levels.fitting_host, levels.lease.own, levels.snapshot
    if network is None or own is None or snapshot is None or levels.accept_in is None:
        return None
    if not is_compatible(own.record, network.config):
        if last is None:
            return None
        network, host = last.network, last.host if host is None else host
        if tuple(family for family, _ in host.external.addresses.items()) != network.config.families:
            host = last.host
    if host is None:
        return None
    return Inputs(network, host, own, snapshot, levels.accept_in)


def same(new: Inputs, old: Inputs | None) -> bool:
    """By identity: whoever offers a level offers a new object when it has changed, and only then."""
    return old is not None and all(a is b for a, b in zip(new, old, strict=True))


class Feasible(NamedTuple):
    """A target that this host can be brought to."""

    target: Target
    inputs: Inputs
    """What it was made of."""
    obstacle: FlanneldError | None = None
    """Why it is not that of the latest inputs."""


def feasible_target(
    inputs: Inputs,
    last: Inputs | None,
    departed: Collection[Record],
    settings: Settings,
    make: Callable[[Inputs, Collection[Record], Settings], Target],
) -> Feasible:
    """The desired state for these inputs, or else for the config and the host that `last` had, which worked.

    Peers and their departures are followed all the same. `make` is `Aim.target_of`.

    Raises:
        ConfigError, HostError: nothing has worked yet.
    """
    try:
        return Feasible(make(inputs, departed, settings), inputs)
    except (ConfigError, HostError) as error:
        if last is None:
            raise
        own = inputs.own if is_compatible(inputs.own.record, last.network.config) else last.own
        worked = inputs._replace(network=last.network, host=last.host, own=own)
        return Feasible(make(worked, departed, settings), worked, error)


def target_for(inputs: Inputs, settings: Settings, peers: Peers) -> Target:
    """The desired state for these inputs, once it is decided who is a peer.

    Raises:
        ConfigError, HostError: the backend cannot work on this host as configured.
    """
    network = inputs.network
    state = desired_state(inputs, settings, peers.accepted)
    tool = settings.tools.choose(nftables=network.config.nftables)
    if tool is not None or settings.wish.masquerade:
        # Without any tool, writing the rules of nft says which one is missing.
        state = replace(state, rules=_rules(inputs, settings, tool or "nft"))
    networks = (*network.config.networks, *network.former)
    return Target(
        state,
        peers,
        network.backend.mtu(inputs.host),
        scope_of(inputs, settings, state, (*networks, *settings.known_networks)),
        tool if state.rules else None,
        networks,
        frozenset((*state.links, *(route.nexthop.dev for route in state.routes.values()))),
    )


def desired_state(inputs: Inputs, settings: Settings, peers: Sequence[Record]) -> State:
    """All rows but the packet filter's. Raises as `target_for` does."""
    network, host, record = inputs.network, inputs.host, inputs.own.record
    backend = network.backend
    text = subnet_env(network.config, record, backend.mtu(host), ipmasq=settings.wish.masquerade)
    return desired(
        backend.desired,
        record,
        peers,
        host,
        (settings.subnet_file, text),
        blackhole=settings.blackhole,
    )


def _rules(inputs: Inputs, settings: Settings, tool: Tool) -> dict[ChainKey, Chain]:
    networks, own = inputs.network.config.network_of, inputs.own.record.subnets
    return desired_rules(networks, own, settings.wish, names_of(settings.prefix), tool, inputs.accept_in)


class Adoptable(Mapping[IPNetwork, frozenset[IPAddress]]):
    """Subnet of a known record → the gateways to it; put together when somebody looks.

    Most of the time nobody does: only for a route in our Networks that Go flannel or people have set.
    """

    def __init__(self, snapshot: Snapshot, state: State) -> None:
        self._snapshot = snapshot
        self._routes = state.routes
        self._made: dict[IPNetwork, frozenset[IPAddress]] | None = None

    def _rows(self) -> dict[IPNetwork, frozenset[IPAddress]]:
        if self._made is not None:
            return self._made
        made: dict[IPNetwork, frozenset[IPAddress]] = {}
        for record in self._snapshot.records.values():
            for family, subnet in record.subnets.items():
                public = record.public_ips.get(family)
                gateways = (ip for ip in (subnet.network_address, public) if ip is not None)
                # Two records may share the subnet of one family.
                made[subnet] = made.get(subnet, frozenset()) | frozenset(gateways)
        for destination in self._routes:
            made.setdefault(destination, frozenset())  # such as the whole Network
        self._made = made
        return made

    def __getitem__(self, key: IPNetwork) -> frozenset[IPAddress]:
        return self._rows()[key]

    def __iter__(self) -> Iterator[IPNetwork]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())


def scope_of(inputs: Inputs, settings: Settings, state: State, networks: Iterable[IPNetwork]) -> Scope:
    """What the drivers may take for ours."""
    return Scope(
        prefix=settings.prefix,
        networks=tuple(dict.fromkeys(networks)),
        adoptable=Adoptable(inputs.snapshot, state),
        sysctls=frozenset(state.sysctls),
        offloads=frozenset(state.offloads),
        files=frozenset(state.files),
        devices=frozenset(state.links),
    )
