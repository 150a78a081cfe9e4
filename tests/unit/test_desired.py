"""What a pass aims at: the same whatever the order of events, and never a route to ourselves."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import Family, PerFamily
from flanneld_py.backends import BACKENDS, backend_of
from flanneld_py.core.desired import subnet_env
from flanneld_py.daemon.aim import Aim
from flanneld_py.daemon.inbox import LeaseState, Levels, Network
from flanneld_py.daemon.target import Inputs, Settings, Target, inputs_of, same
from flanneld_py.errors import HostError
from flanneld_py.model import OwnLease, Record, Scope
from tests.unit import strategies
from tests.unit.strategies import (
    PREFIX,
    clashing_records,
    host,
    mac,
    neighbour,
    snapshot_of,
    subnet,
    thorough,
    underlay,
    usual,
)

SETTINGS = Settings(PREFIX, "/run/flannel/subnet.env")
every_backend = pytest.mark.parametrize("name", sorted(BACKENDS))


def record(number: int, families: tuple[Family, ...] = (4,), backend_type: str = "vxlan") -> Record:
    numbers = {family: 16 * number + family for family in families}
    return Record(
        key=f"r{number}",
        subnets=strategies.per_family({family: subnet(family, number) for family in families}),
        public_ips=strategies.per_family({family: underlay(family, number) for family in families}),
        backend_type=backend_type,
        vtep_macs=strategies.per_family({family: mac(n) for family, n in numbers.items()}),
        node_id=f"node-{number}",
        create_revision=number,
    )


def inputs(
    *records: Record, name: str = "vxlan", families: tuple[Family, ...] = (4,), own: Record | None = None
) -> Inputs:
    config = strategies.config(name, families)
    own = own or record(1, families, name)
    return Inputs(
        Network(config, backend_of(config)),
        host(1, families),
        OwnLease(own, 86_400),
        snapshot_of((own, *records)),
    )


def aim(given_: Inputs, *departed: Record, settings: Settings = SETTINGS) -> Target:
    return Aim().target_of(given_, departed, settings)


def target(*records: Record, name: str = "vxlan", families: tuple[Family, ...] = (4,)) -> Target:
    return aim(inputs(*records, name=name, families=families))


@st.composite
def seen(draw: st.DrawFn) -> tuple[tuple[Family, ...], str, list[Record]]:
    """Families, a backend, and records of all kinds, some for our own subnet."""
    families: tuple[Family, ...] = draw(st.sampled_from(((4,), (4, 6))))
    name = draw(st.sampled_from(sorted(BACKENDS)))
    count = draw(st.integers(0, 6))
    return families, name, [draw(clashing_records(f"peer{n}", families)) for n in range(count)]


# --- properties -----------------------------------------------------------------------------------


@thorough
@given(seen(), st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(
    world: tuple[tuple[Family, ...], str, list[Record]], random: Random
) -> None:
    families, name, records = world
    one = inputs(*records, name=name, families=families)
    keys = random.sample(list(one.snapshot.records), len(one.snapshot.records))
    shuffled = replace(one.snapshot, records={key: one.snapshot.records[key] for key in keys})
    assert aim(one._replace(snapshot=shuffled)) == aim(one)


@thorough
@given(seen())
def test_no_route_leads_to_ourselves(world: tuple[tuple[Family, ...], str, list[Record]]) -> None:
    families, name, records = world
    one = inputs(*records, name=name, families=families)
    state = aim(one).state
    own = one.own.record
    for family, mine in own.subnets.items():
        led = [to for to, route in state.routes.items() if route.nexthop.via is not None]
        led += [to for _, to in state.tunnel]
        assert not any(to.version == family and to.overlaps(mine) for to in led)
    assert not {end.address for end in state.tunnel.values()} & {*own.public_ips.values()}
    assert not {*own.public_ips.values()} & {*state.fdb.values()}
    assert not {*own.vtep_macs.values()} & {key[1] for key in state.fdb}
    assert not {*own.vtep_macs.values()} & {*state.neighs.values()}


@thorough
@given(seen())
def test_every_row_has_what_it_needs(world: tuple[tuple[Family, ...], str, list[Record]]) -> None:
    families, name, records = world
    found = target(*records, name=name, families=families)
    state = found.state
    routes = list(state.routes)
    assert not any(a.version == b.version and a.overlaps(b) for i, a in enumerate(routes) for b in routes[:i])
    for to, route in state.routes.items():
        hop = route.nexthop
        assert (hop in state.nexthops) == (to.version == 4 and hop.via is not None)
        if hop.via is None:
            assert hop.dev in state.pumps
        elif hop.dev in state.links:
            assert (hop.dev, state.neighs[neighbour(hop)]) in state.fdb
    through = {route.nexthop for to, route in state.routes.items() if to.version == 4}
    assert set(state.nexthops) == {hop for hop in through if hop.via is not None}
    assert {dev for dev, _ in state.tunnel} <= set(state.pumps) <= set(state.links)
    devices = {*state.links, "eth0"}
    rows = [*state.addrs, *state.fdb, *state.neighs]
    assert {dev for dev, _ in rows} | {route.nexthop.dev for route in state.routes.values()} <= devices
    assert found.devices <= devices


@usual
@given(seen())
def test_the_file_does_not_depend_on_peers(world: tuple[tuple[Family, ...], str, list[Record]]) -> None:
    families, name, records = world
    assert target(*records, name=name, families=families).state.files == (
        target(name=name, families=families).state.files
    )


# --- subnet.env -----------------------------------------------------------------------------------


def test_subnet_env_by_hand() -> None:
    text = subnet_env(strategies.config(), record(34), 1450, ipmasq=False)
    assert text == (
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )


def test_subnet_env_of_both_families() -> None:
    both: tuple[Family, ...] = (4, 6)
    text = subnet_env(strategies.config(families=both), record(34, both), 1430, ipmasq=True)
    assert text == (
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\n"
        "FLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET=fd00:5:0:22::1/64\n"
        "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
    )


@pytest.mark.parametrize(
    ("name", "families", "mtu"),
    [("vxlan", (4,), 1450), ("vxlan", (6,), 1430), ("vxlan", (4, 6), 1430), ("host-gw", (4, 6), 1500)],
)
def test_the_mtu_told_is_the_backends(name: str, families: tuple[Family, ...], mtu: int) -> None:
    found = target(name=name, families=families)
    assert found.mtu == mtu
    assert f"FLANNEL_MTU={mtu}\n" in found.state.files["/run/flannel/subnet.env"]


# --- what belongs to a target ---------------------------------------------------------------------


def test_devices_are_ours_or_those_that_routes_leave_by() -> None:
    assert target(record(2)).devices == {"flannel.1"}
    assert target().devices == {"flannel.1"}
    gateway = record(2, (6,), "host-gw")
    assert target(gateway, name="host-gw", families=(6,)).devices == {"eth0"}


def test_rejected_peers_are_named_and_have_no_rows() -> None:
    stranger = record(2, backend_type="host-gw")
    found = target(stranger, record(3))
    assert [peer.key for peer in found.peers.accepted] == ["r3"]
    assert set(found.peers.rejected) == {"r2"}
    assert set(found.state.routes) == {subnet(4, 3)}


def test_the_departed_stay_until_another_has_their_subnet() -> None:
    gone = record(2)
    assert aim(inputs(record(3)), gone).state == target(gone, record(3)).state
    heir = replace(record(4), key="r2", subnets=gone.subnets)
    assert aim(inputs(heir), gone).state == target(heir).state


def test_scope_is_what_is_ours_to_look_for() -> None:
    old = (ip_network("10.4.0.0/16"), ip_network("10.5.0.0/16"))
    nat = replace(record(2), public_ips=PerFamily(ip_address("203.0.113.2")))
    found = aim(inputs(nat), settings=replace(SETTINGS, known_networks=old)).scope
    assert found == Scope(
        prefix=PREFIX,
        networks=(ip_network("10.5.0.0/16"), ip_network("10.4.0.0/16")),
        adoptable={
            subnet(4, 1): frozenset({ip_address("10.5.1.0"), underlay(4, 1)}),
            subnet(4, 2): frozenset({ip_address("10.5.2.0"), ip_address("203.0.113.2")}),
        },
        sysctls=frozenset({"net/ipv6/conf/flannel.1/accept_ra"}),
        files=frozenset({"/run/flannel/subnet.env"}),
        devices=frozenset({"flannel.1"}),
    )


def test_scope_knows_every_gateway_of_a_subnet_that_two_records_name() -> None:
    one, other = record(2, (4, 6)), replace(record(3, (4, 6)), subnets=PerFamily(subnet(4, 2), subnet(6, 3)))
    for records in ((one, other), (other, one)):
        gateways = target(*records, families=(4, 6)).scope.adoptable[subnet(4, 2)]
        assert gateways == {ip_address("10.5.2.0"), underlay(4, 2), underlay(4, 3)}


def test_a_backend_that_cannot_work_here_says_why() -> None:
    nat = replace(host(1).external, public=PerFamily(ip_address("203.0.113.1")))
    with pytest.raises(HostError, match="host-gw"):
        aim(inputs(name="host-gw")._replace(host=replace(host(1), external=nat)))


def test_nothing_is_aimed_at_before_everything_is_known() -> None:
    full = inputs()
    known = {
        "network": full.network,
        "host": full.host,
        "lease": LeaseState("held", full.own),
        "snapshot": full.snapshot,
    }
    assert inputs_of(replace(Levels(), **known)) == full
    for name in known:
        partly = {key: value for key, value in known.items() if key != name}
        assert inputs_of(replace(Levels(), **partly)) is None


def test_inputs_are_the_same_only_as_the_same_objects() -> None:
    one = inputs()
    assert same(one, one._replace())
    assert not same(one, None)
    assert not same(one._replace(snapshot=replace(one.snapshot)), one)
    assert not same(one._replace(host=replace(one.host)), one)


def test_a_blackhole_for_each_own_subnet_when_asked_for() -> None:
    settings = replace(SETTINGS, blackhole=True)
    one = inputs(record(2, (4, 6)), families=(4, 6))
    with_it, without = aim(one, settings=settings).state, aim(one).state
    assert with_it.blackholes == {subnet(4, 1): True, subnet(6, 1): True}
    assert without == replace(with_it, blackholes={})
