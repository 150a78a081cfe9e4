"""What every backend owes, asked of all in BACKENDS, and what those without options have of their own."""

from __future__ import annotations

import json
from functools import partial
from ipaddress import ip_address, ip_network
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import Family, IPNetwork, PerFamily
from flanneld_py.backends import BACKENDS
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.desired import desired
from flanneld_py.core.leasedecision import Keep, Wish
from flanneld_py.core.plan import plan
from flanneld_py.core.records import encode
from flanneld_py.errors import ConfigError, HostError
from flanneld_py.model import NextHop, Route, State
from tests.unit import strategies
from tests.unit.backends import backend, can, network, published_record
from tests.unit.fake_kernel import FakeKernel
from tests.unit.strategies import FAMILIES, host, mac, snapshot_of, subnet, usual

every_backend = pytest.mark.parametrize("name", sorted(BACKENDS))
every_backend_with_routes = pytest.mark.parametrize("name", sorted(BACKENDS.keys() - {"alloc"}))
ALONE: tuple[tuple[Family, ...], ...] = ((4,), (6,), (4, 6))


def with_families(*without: str) -> pytest.MarkDecorator:
    """Every backend but some, with every set of families that it can carry."""
    pairs = [(name, f) for name in sorted(BACKENDS.keys() - {*without}) for f in ALONE if can(name, f)]
    return pytest.mark.parametrize(("name", "families"), pairs, ids=str)


def led(state: State) -> set[IPNetwork]:
    """The subnets to which packets are led, by routes of their own or by a pump."""
    whole = {to for to, route in state.routes.items() if route.nexthop.via is None}
    return set(state.routes) - whole | {to for _, to in state.tunnel}


@every_backend
@usual
@given(FAMILIES, st.integers(0, 6), st.randoms(use_true_random=False))
def test_the_order_of_peers_does_not_matter(
    name: str, families: tuple[Family, ...], count: int, random: Random
) -> None:
    assume(can(name, families))
    one, here, (own, *peers) = network(name, count + 1, families)
    assert one.desired(own, random.sample(peers, count), here) == one.desired(own, peers, here)


@with_families("alloc")
def test_nothing_leads_to_ourselves(name: str, families: tuple[Family, ...]) -> None:
    one, here, (own, *peers) = network(name, 4, families)
    state = one.desired(own, peers, here)
    assert led(state) == {net for peer in peers for net in peer.subnets.values()}
    assert not led(state) & set(own.subnets.values())
    ours = {*own.vtep_macs.values(), *own.public_ips.values()}
    assert not ours & {*state.fdb.values(), *state.neighs.values(), *(key[1] for key in state.fdb)}
    assert not ours & {route.nexthop.via for route in state.routes.values()}
    assert not ours & {end.address for end in state.tunnel.values()}


@with_families("alloc")
def test_rows_of_a_peer_come_and_go_with_it(name: str, families: tuple[Family, ...]) -> None:
    one, here, (own, first, second) = network(name, 3, families)
    alone, with_first = one.desired(own, [], here), one.desired(own, [first], here)
    assert led(alone) == set()
    assert len(led(with_first)) == len(families)
    both = one.desired(own, [first, second], here)
    for table in strategies.TABLES:
        assert with_first.table(table).items() <= both.table(table).items()
        assert alone.table(table).items() <= with_first.table(table).items()


@with_families()
def test_rows_of_peers_are_all_that_they_add(name: str, families: tuple[Family, ...]) -> None:
    one, here, (own, *peers) = network(name, 4, families)
    alone, rows, both = (
        one.desired(own, [], here),
        one.peer_rows(own, peers, here),
        one.desired(own, peers, here),
    )
    for table in strategies.TABLES:
        assert not alone.table(table).keys() & rows.table(table).keys()
        assert {**alone.table(table), **rows.table(table)} == both.table(table)


@with_families()
def test_a_kernel_takes_all_of_it_and_the_second_plan_is_empty(
    name: str, families: tuple[Family, ...]
) -> None:
    one, here, (own, *peers) = network(name, 4, families)
    want = desired(one.desired, own, peers, here, ("/run/flannel/subnet.env", "text"))
    kernel = FakeKernel()
    for op in plan(want, State()):
        assert kernel.apply(op) is None
    assert plan(want, kernel.observe(want.sysctls)) == []


@with_families()
def test_published_data_survive_the_registry(name: str, families: tuple[Family, ...]) -> None:
    one, here = backend(name, families), host(1, families)
    found = one.published(here, None)
    assert json.loads(json.dumps(found.backend_data.v4)) == found.backend_data.v4
    record = published_record(one, here, 1, families)
    assert record.backend_type == found.backend_type
    assert record.public_ips == here.external.public
    assert record.backend_data == found.backend_data


@with_families()
def test_what_stands_is_published_again_unchanged(name: str, families: tuple[Family, ...]) -> None:
    # Otherwise a restart would write to the registry, and wake up every host.
    one, here = backend(name, families), host(1, families)
    record = published_record(one, here, 1, families)
    again = one.published(replace(here, macs={"flannel.1": mac(9), "flannel-v6.1": mac(8)}), record)
    asked = Wish(again.backend_type, again.public_ips, again.backend_data)
    config = strategies.config(name, families)
    assert decide_lease(config, snapshot_of([record]), here, asked, Random(1)) == Keep(record)


@every_backend
def test_an_address_of_a_family_not_in_use_is_not_written_again_and_again(name: str) -> None:
    one, here = backend(name, (4,)), host(1, (4, 6))
    record = published_record(one, here, 1)
    found = one.published(here, record)
    asked = Wish(found.backend_type, found.public_ips, found.backend_data)
    assert decide_lease(strategies.config(name), snapshot_of([record]), here, asked, Random(1)) == Keep(
        record
    )


@every_backend
@pytest.mark.parametrize("external", [1280, 1400, 1500, 9001, 65535])
def test_no_packet_grows_beyond_the_interface(name: str, external: int) -> None:
    for families in filter(partial(can, name), ALONE):
        one, here = backend(name, families), host(1, families, mtu=external)
        if (name, families, external) == ("udp", (4, 6), 1280):
            continue  # refused, see below
        own = published_record(one, here, 1, families)
        assert 0 < one.mtu(here) <= external
        for link in one.desired(own, [], here).links.values():
            assert link.mtu <= external
            # With less the interface is too small for IPv6 over vxlan, and the kernel says so.
            assert one.mtu(here) <= link.mtu or external < 1350


@every_backend_with_routes
def test_a_peer_without_our_family_gets_no_rows_of_it(name: str) -> None:
    one, here, (own, _) = network(name, 2, (4,))
    dual = published_record(backend(name, (4, 6)), host(2, (4, 6)), 2, (4, 6))
    assert led(one.desired(own, [dual], here)) == {subnet(4, 2)}
    only_v6 = published_record(backend("host-gw", (6,)), host(2, (6,)), 2, (6,))
    assert led(one.desired(own, [only_v6], here)) == set()


@every_backend
def test_the_type_is_the_name(name: str) -> None:
    assert backend(name).type == name


@pytest.mark.parametrize("name", ["geneve", "", "VXLAN"])
def test_an_unknown_backend_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        backend(name)
    assert f'Backend.Type "{name}"' in str(error.value)
    assert all(known in str(error.value) for known in BACKENDS)


# --- host-gw --------------------------------------------------------------------------------------


def test_host_gw_takes_nothing_from_the_mtu() -> None:
    assert backend("host-gw").mtu(host(1, mtu=1500)) == 1500


def test_host_gw_rows_by_hand() -> None:
    one, here, (own, peer) = network("host-gw", 2, (4, 6))
    assert one.desired(own, [peer], here) == State(
        routes={
            ip_network("10.5.2.0/24"): Route(NextHop("eth0", ip_address("192.0.2.2"), onlink=False)),
            ip_network("fd00:5:0:2::/64"): Route(NextHop("eth0", ip_address("2001:db8::2"), onlink=False)),
        }
    )


def test_host_gw_record_by_hand() -> None:
    one = backend("host-gw")
    assert encode(published_record(one, host(1), 1)) == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw","NodeID":"node-1"}'
    )


def test_host_gw_behind_nat_is_refused() -> None:
    here = host(1)
    here = replace(here, external=replace(here.external, public=PerFamily(ip_address("203.0.113.9"))))
    with pytest.raises(HostError, match=r"--public-ip 203\.0\.113\.9: .*eth0 does not have it; use vxlan"):
        backend("host-gw").published(here, None)


# --- alloc ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=str)
def test_alloc_leases_and_wants_nothing_of_the_kernel(families: tuple[Family, ...]) -> None:
    one, here, (own, *peers) = network("alloc", 3, families)
    assert one.desired(own, peers, here) == State()
    assert one.mtu(here) == 1500


def test_alloc_record_by_hand() -> None:
    """As flannel writes it: no BackendType."""
    assert encode(published_record(backend("alloc"), host(1), 1)) == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":null,"NodeID":"node-1"}'
    )
