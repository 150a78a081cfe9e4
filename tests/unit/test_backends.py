"""What every backend owes, asked of all in BACKENDS, and what each one has of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flanneld_py.backends import BACKENDS, backend_of
from flanneld_py.backends.base import Backend
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.desired import desired
from flanneld_py.core.leasedecision import Keep, Wish
from flanneld_py.core.plan import plan
from flanneld_py.core.records import decode, encode, format_key
from flanneld_py.datapath import Endpoint, PumpSettings, TunLink
from flanneld_py.errors import ConfigError, HostError
from flanneld_py.model import (
    Entry,
    Family,
    Host,
    IPNetwork,
    NextHop,
    PerFamily,
    Record,
    Route,
    State,
    VxlanLink,
)
from tests.unit import strategies
from tests.unit.fake_kernel import FakeKernel
from tests.unit.strategies import FAMILIES, host, mac, per_family, snapshot_of, subnet, underlay, usual, vxlan

every_backend = pytest.mark.parametrize("name", sorted(BACKENDS))
every_backend_with_routes = pytest.mark.parametrize("name", sorted(BACKENDS.keys() - {"alloc"}))
ALONE: tuple[tuple[Family, ...], ...] = ((4,), (6,), (4, 6))


def with_families(*without: str) -> pytest.MarkDecorator:
    """Every backend but some, with every set of families that it can carry."""
    pairs = [(name, f) for name in sorted(BACKENDS.keys() - {*without}) for f in ALONE if can(name, f)]
    return pytest.mark.parametrize(("name", "families"), pairs, ids=str)


def can(name: str, families: Sequence[Family]) -> bool:
    """Udp needs IPv4 to carry IPv6."""
    return name != "udp" or 4 in families


def backend(name: str, families: Sequence[Family] = (4,), **options: Any) -> Backend:
    lower = {key.lower(): value for key, value in options.items()}
    return backend_of(strategies.config(name, families, lower))


def published_record(one: Backend, here: Host, number: int, families: Sequence[Family] = (4,)) -> Record:
    """What the registry gives back of the lease of subnet `number` that a host publishes."""
    subnets = per_family({family: subnet(family, number) for family in families})
    found = one.published(here, None)
    asked = Wish(found.backend_type, found.public_ips, found.backend_data)
    value = encode(asked.record(subnets, here.node_id))
    return decode(Entry(f"subnets/{format_key(subnets)}", value.encode(), number, number, 7))


def network(name: str, count: int, families: Sequence[Family] = (4,)) -> tuple[Backend, Host, list[Record]]:
    """A backend, the host of number 1, and the records of the hosts 1 to `count`."""
    one = backend(name, families)
    records = [published_record(one, host(n, families), n, families) for n in range(1, count + 1)]
    return one, host(1, families), records


def data(one: Backend, here: Host, own: Record | None = None, family: Family = 4) -> Any:
    """BackendData or BackendV6Data as published."""
    return one.published(here, own).backend_data.get(family)


def led(state: State) -> set[IPNetwork]:
    """The subnets to which packets are led, by routes of their own or by a pump."""
    whole = {to for to, route in state.routes.items() if route.nexthop.via is None}
    return set(state.routes) - whole | {to for _, to in state.tunnel}


# --- of every backend -----------------------------------------------------------------------------


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


# --- vxlan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("families", "external", "option", "v4", "v6", "told"),
    [
        ((4,), 1500, None, 1450, None, 1450),
        ((6,), 1500, None, None, 1430, 1430),
        ((4, 6), 1500, None, 1450, 1430, 1430),
        ((4,), 9000, None, 8950, None, 8950),
        ((4,), 1500, 1400, 1350, None, 1350),
        ((4, 6), 9000, 1500, 1450, 1430, 1430),
        ((4,), 1500, 0, 1450, None, 1450),
        # The kernel takes no device MTU beyond what the interface below carries.
        ((4,), 1500, 9000, 1450, None, 1450),
        ((6,), 1500, 9000, None, 1430, 1430),
    ],
)
def test_vxlan_mtu(
    families: tuple[Family, ...], external: int, option: int | None, v4: int | None, v6: int | None, told: int
) -> None:
    options = {} if option is None else {"MTU": option}
    one, here = backend("vxlan", families, **options), host(1, families, mtu=external)
    assert one.mtu(here) == told
    links = one.desired(published_record(one, here, 1, families), [], here).links
    found = {name: link.mtu for name, link in links.items()}
    assert (found.get("flannel.1"), found.get("flannel-v6.1")) == (v4, v6)


def test_vxlan_rows_by_hand() -> None:
    one, here, _ = network("vxlan", 1)
    own = published_record(one, replace(here, macs={"flannel.1": mac(1)}), 1)
    peer_host = replace(host(2), macs={"flannel.1": mac(2)})
    peer = published_record(one, peer_host, 2)
    hop = NextHop("flannel.1", ip_address("10.5.2.0"), onlink=True)
    assert one.desired(own, [peer], here) == State(
        links={
            "flannel.1": VxlanLink(
                vni=1,
                port=8472,
                dev="eth0",
                local=ip_address("192.0.2.1"),
                mtu=1450,
                mac="02:00:00:00:00:01",
                alias="flanneld-py:/coreos.com/network",
                learning=False,
                gbp=False,
                up=True,
            )
        },
        sysctls={"net/ipv6/conf/flannel.1/accept_ra": "0"},
        addrs={("flannel.1", ip_interface("10.5.1.0/32")): True},
        fdb={("flannel.1", "02:00:00:00:00:02"): ip_address("192.0.2.2")},
        neighs={("flannel.1", ip_address("10.5.2.0")): "02:00:00:00:00:02"},
        routes={ip_network("10.5.2.0/24"): Route(hop)},
    )


def test_vxlan_v6_rows_by_hand() -> None:
    one, here, (own, peer) = network("vxlan", 2, (6,))
    state = one.desired(own, [peer], here)
    assert set(state.links) == {"flannel-v6.1"}
    assert vxlan(state.links["flannel-v6.1"]).local == ip_address("2001:db8::1")
    assert state.addrs == {("flannel-v6.1", ip_interface("fd00:5:0:1::/128")): True}
    via = ip_address("fd00:5:0:2::")
    assert state.routes == {ip_network("fd00:5:0:2::/64"): Route(NextHop("flannel-v6.1", via, onlink=True))}
    assert state.neighs == {("flannel-v6.1", via): peer.vtep_macs.v6}
    assert state.fdb == {("flannel-v6.1", peer.vtep_macs.v6): ip_address("2001:db8::2")}


def test_vxlan_record_by_hand() -> None:
    found = backend("vxlan").published(replace(host(1), macs={"flannel.1": mac(7)}), None)
    assert found.backend_type == "vxlan"
    assert found.public_ips == PerFamily(underlay(4, 1))
    assert found.backend_data == PerFamily({"VNI": 1, "VtepMAC": "02:00:00:00:00:07"})
    # Go writes and reads them in this order.
    assert list(found.backend_data.v4 or ()) == ["VNI", "VtepMAC"]


def test_vxlan_behind_nat_publishes_the_outer_address_and_tunnels_from_its_own() -> None:
    here = host(1)
    here = replace(here, external=replace(here.external, public=PerFamily(ip_address("203.0.113.9"))))
    one = backend("vxlan")
    record = published_record(one, here, 1)
    assert record.public_ips.v4 == ip_address("203.0.113.9")
    assert vxlan(one.desired(record, [], here).links["flannel.1"]).local == ip_address("192.0.2.1")


def test_vxlan_mac_is_the_published_one_then_the_devices_then_one_of_its_own() -> None:
    one, here = backend("vxlan"), host(1)
    own = published_record(one, replace(here, macs={"flannel.1": mac(5)}), 1)

    def told(known: dict[str, str], record: Record | None) -> str:
        return str(data(one, replace(here, macs=known), record)["VtepMAC"])

    assert told({"flannel.1": mac(9)}, own) == mac(5)
    assert told({"flannel.1": mac(9)}, None) == mac(9)
    made = told({}, None)
    assert made == told({"eth0": mac(3)}, None)
    assert made != data(one, host(2))["VtepMAC"]
    again = one.desired(own, [], replace(here, macs={"flannel.1": mac(9)}))
    assert vxlan(again.links["flannel.1"]).mac == mac(5)


def test_vxlan_without_ipv6_in_the_kernel_sets_no_ipv6_sysctl() -> None:
    one, here, (own, _) = network("vxlan", 2)
    assert one.desired(own, [], replace(here, ipv6=False)).sysctls == {}


@pytest.mark.parametrize(
    ("mtu", "devices"),
    [(1329, ()), (1330, ("flannel.1",)), (1349, ("flannel.1",)), (1350, ("flannel.1", "flannel-v6.1"))],
)
def test_vxlan_sets_no_ipv6_sysctl_of_a_device_too_small_for_ipv6(mtu: int, devices: tuple[str, ...]) -> None:
    """The kernel has none for a device of less than 1280 bytes."""
    one, here, (own, _) = network("vxlan", 2, (4, 6))
    small = replace(here, external=replace(here.external, mtu=mtu))
    expected = {f"net/ipv6/conf/{dev}/accept_ra": "0" for dev in devices}
    if "flannel-v6.1" in devices:
        expected["net/ipv6/conf/flannel-v6.1/disable_ipv6"] = "0"
    assert one.desired(own, [], small).sysctls == expected


@pytest.mark.parametrize("families", [(6,), (4, 6)])
@pytest.mark.parametrize("mtu", [1349, 1300])
def test_vxlan_never_asks_for_less_than_ipv6_needs(families: tuple[Family, ...], mtu: int) -> None:
    """The kernel would drop IPv6 from the device, and all peers with it."""
    one, here, (own, _) = network("vxlan", 2, families)
    small = replace(here, external=replace(here.external, mtu=mtu))
    links = one.desired(own, [], small).links
    assert links["flannel-v6.1"].mtu == one.mtu(small) == 1280


def test_vxlan_options_reach_the_device() -> None:
    one = backend("vxlan", (4, 6), VNI=42, Port=4789, GBP=True, Learning=True)
    here = host(1, (4, 6))
    links = one.desired(published_record(one, here, 1, (4, 6)), [], here).links
    assert set(links) == {"flannel.42", "flannel-v6.42"}
    for link in map(vxlan, links.values()):
        assert (link.vni, link.port, link.gbp, link.learning) == (42, 4789, True, True)
    assert data(one, here, family=6)["VNI"] == 42


def test_t08_vxlan_defaults() -> None:
    assert backend("vxlan") == backend("vxlan", VNI=1, Port=8472, MTU=0, GBP=False, Learning=False)
    assert backend("vxlan", Port=0) == backend("vxlan", Mac="02:00:00:00:00:01")
    assert backend("vxlan", VNI=None, Port=None, GBP=None) == backend("vxlan")


def test_t08_vxlan_options_given() -> None:
    one, here = backend("vxlan", MTU=1400, GBP=True, DirectRouting=True), host(1)
    (link,) = map(vxlan, one.desired(published_record(one, here, 1), [], here).links.values())
    assert (link.vni, link.port, link.mtu, link.gbp, link.learning) == (1, 8472, 1350, True, False)


@pytest.mark.parametrize(
    ("families", "option", "good", "bad"),
    [
        ((4,), "VNI", (1, 9_999_999), (0, -1, 10_000_000, 2**24)),
        ((4, 6), "VNI", (1, 9_999), (0, 10_000)),
        ((4,), "Port", (0, 1, 65_535), (-1, 65_536)),
        ((4,), "MTU", (0, 576, 65_535), (-1, 1, 575, 65_536)),
        ((6,), "MTU", (0, 1350), (1, 1279, 1280, 1349)),
        ((4, 6), "MTU", (0, 1350), (1, 1280, 1349)),
    ],
)
def test_vxlan_bounds(
    families: tuple[Family, ...], option: str, good: tuple[int, ...], bad: tuple[int, ...]
) -> None:
    for value in good:
        one, here = backend("vxlan", families, **{option: value}), host(1, families)
        links = one.desired(published_record(one, here, 1, families), [], here).links
        # Longest interface name the kernel takes (linux/if.h IFNAMSIZ, with its final NUL).
        assert all(len(name) <= 15 for name in links)
    for value in bad:
        with pytest.raises(ConfigError, match=rf"Backend\.{option} {value}: expected"):
            backend("vxlan", families, **{option: value})


@pytest.mark.parametrize("option", ["VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting"])
@pytest.mark.parametrize("value", ["1", 1.0, [], {}, "true"], ids=repr)
def test_vxlan_options_of_a_wrong_type(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Backend\.{option} .*: expected .*without quotes"):
        backend("vxlan", **{option: value})


def test_vxlan_numbers_are_no_booleans_and_booleans_no_numbers() -> None:
    with pytest.raises(ConfigError, match=r"Backend\.VNI true"):
        backend("vxlan", VNI=True)
    with pytest.raises(ConfigError, match=r"Backend\.GBP 1"):
        backend("vxlan", GBP=1)


def direct_routing(onlink: Sequence[str], families: Sequence[Family] = (4, 6)) -> State:
    """What host 1 wants for host 2 when the external interface is connected to these networks."""
    _, here, (own, peer) = network("vxlan", 2, families)
    connected = replace(here, onlink=tuple(ip_network(text) for text in onlink))
    return backend("vxlan", families, DirectRouting=True).desired(own, [peer], connected)


def test_vxlan_direct_routing_by_hand() -> None:
    direct4 = Route(NextHop("eth0", ip_address("192.0.2.2"), onlink=False))
    direct6 = Route(NextHop("eth0", ip_address("2001:db8::2"), onlink=False))
    both = direct_routing(["192.0.2.0/24", "2001:db8::/64"])
    assert both.routes == {ip_network("10.5.2.0/24"): direct4, ip_network("fd00:5:0:2::/64"): direct6}
    assert (both.fdb, both.neighs) == ({}, {})
    assert set(both.links) == {"flannel.1", "flannel-v6.1"}, "other peers may need them"


@pytest.mark.parametrize("onlink", [(), ("198.51.100.0/24",), ("192.0.2.0/31", "2001:db8::8/125")], ids=str)
def test_vxlan_direct_routing_to_a_peer_behind_a_router_is_the_tunnel(onlink: tuple[str, ...]) -> None:
    one, here, (own, peer) = network("vxlan", 2, (4, 6))
    assert direct_routing(onlink) == one.desired(own, [peer], here)


def test_vxlan_direct_routing_is_decided_for_each_family() -> None:
    state = direct_routing(["2001:db8::/64"])
    assert state.routes[ip_network("10.5.2.0/24")].nexthop.dev == "flannel.1"
    assert state.routes[ip_network("fd00:5:0:2::/64")].nexthop.dev == "eth0"
    assert {dev for dev, _ in (*state.fdb, *state.neighs)} == {"flannel.1"}


def test_vxlan_without_direct_routing_always_tunnels() -> None:
    one, here, (own, peer) = network("vxlan", 2)
    connected = replace(here, onlink=(ip_network("192.0.2.0/24"),))
    assert one.desired(own, [peer], connected) == one.desired(own, [peer], here)


@pytest.mark.parametrize(
    ("option", "bad_checksums", "want"),
    [
        (None, False, {}),
        ("auto", False, {}),
        ("auto", True, {"flannel.1": False, "flannel-v6.1": False}),
        ("on", True, {"flannel.1": True, "flannel-v6.1": True}),
        ("off", False, {"flannel.1": False, "flannel-v6.1": False}),
    ],
)
def test_vxlan_tx_checksum(option: str | None, bad_checksums: bool, want: dict[str, bool]) -> None:
    one, here = backend("vxlan", (4, 6), TxChecksum=option), host(1, (4, 6), bad_checksums=bad_checksums)
    assert one.desired(published_record(one, here, 1, (4, 6)), [], here).offloads == want


@pytest.mark.parametrize("value", [True, "ON", "yes", 1])
def test_vxlan_tx_checksum_of_a_wrong_value(value: object) -> None:
    with pytest.raises(ConfigError, match=r'Backend\.TxChecksum .*: expected one of "auto", "on", "off"'):
        backend("vxlan", TxChecksum=value)


def test_vxlan_family_without_an_address_to_tunnel_from() -> None:
    one = backend("vxlan", (4, 6))
    own = published_record(one, host(1, (4, 6)), 1, (4, 6))
    with pytest.raises(ConfigError, match=r"IPv6 is enabled .* eth0 has no IPv6 address .*--iface"):
        one.desired(own, [], host(1, (4,)))


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


# --- udp ------------------------------------------------------------------------------------------


def test_udp_rows_by_hand() -> None:
    one, here, (own, peer) = network("udp", 2)
    assert one.desired(own, [peer], here) == State(
        links={"flannel0": TunLink(mtu=1472, alias="flanneld-py:/coreos.com/network")},
        sysctls={"net/ipv6/conf/flannel0/accept_ra": "0"},
        addrs={("flannel0", ip_interface("10.5.1.0/32")): True},
        pumps={
            "flannel0": PumpSettings(
                address=IPv4Address("192.0.2.1"),
                port=8285,
                subnets=PerFamily(ip_network("10.5.1.0/24")),
                networks=(ip_network("10.5.0.0/16"),),
                mtu=1472,
                plane="auto",
                source_check="true",
            )
        },
        tunnel={
            ("flannel0", ip_network("10.5.2.0/24")): Endpoint(IPv4Address("192.0.2.2"), 8285, ipv6=False)
        },
        routes={ip_network("10.5.0.0/16"): Route(NextHop("flannel0", None, onlink=False))},
    )


def test_udp_record_is_as_flannel_writes_it() -> None:
    assert encode(published_record(backend("udp"), host(1), 1)) == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":null,"NodeID":"node-1"}'
    )


def test_udp_with_ipv6_says_so_in_its_record_and_sends_it_only_to_those_that_do() -> None:
    one, here, (own, peer) = network("udp", 2, (4, 6))
    assert encode(own) == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendV6Data":{"IPv6":true},"NodeID":"node-1"}'
    )
    silent = replace(peer, backend_data=PerFamily())
    for record, takes in ((peer, True), (silent, False)):
        found = one.desired(own, [record], here)
        end = Endpoint(IPv4Address("192.0.2.2"), 8285, ipv6=takes)
        assert found.tunnel == {("flannel0", subnet(4, 2)): end, ("flannel0", subnet(6, 2)): end}
        assert set(found.routes) == {ip_network("10.5.0.0/16"), ip_network("fd00:5::/48")}
        assert found.sysctls["net/ipv6/conf/flannel0/disable_ipv6"] == "0"


@pytest.mark.parametrize(
    "data", [None, True, "IPv6", [], {}, {"IPv6": 1}, {"IPv6": "true"}, {"VtepMAC": "x"}]
)
def test_udp_takes_no_other_data_for_a_promise(data: object) -> None:
    one, here, (own, peer) = network("udp", 2, (4, 6))
    found = one.desired(own, [replace(peer, backend_data=PerFamily(None, data))], here)
    assert not any(end.ipv6 for end in found.tunnel.values())


def test_udp_behind_nat_publishes_the_outer_address_and_sends_from_its_own() -> None:
    here = host(1)
    here = replace(here, external=replace(here.external, public=PerFamily(ip_address("203.0.113.9"))))
    one = backend("udp")
    record = published_record(one, here, 1)
    assert record.public_ips.v4 == ip_address("203.0.113.9")
    assert one.desired(record, [], here).pumps["flannel0"].address == ip_address("192.0.2.1")


def test_udp_sends_from_the_published_address_where_it_is_the_hosts() -> None:
    """Peers take packets from that one only, and send to it; --iface may name another."""
    second = ip_address("192.0.2.77")
    here = host(1)
    here = replace(
        here,
        external=replace(here.external, public=PerFamily(second)),
        local_addresses=here.local_addresses | {second},
    )
    one = backend("udp")
    assert one.desired(published_record(one, here, 1), [], here).pumps["flannel0"].address == second


def test_udp_without_ipv4_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"EnableIPv4 false: .* udp carries packets over IPv4"):
        backend("udp", (6,))


def test_udp_with_ipv6_on_too_small_an_interface_is_refused() -> None:
    one, here = backend("udp", (4, 6)), host(1, (4, 6), mtu=1307)
    with pytest.raises(HostError, match="eth0 has MTU 1307, and IPv6 inside udp needs 1308"):
        one.desired(published_record(one, here, 1, (4, 6)), [], here)


def test_udp_options() -> None:
    assert backend("udp") == backend("udp", Port=8285, DataPlane="auto", SourceCheck=True)
    assert backend("udp", Port=0, DataPlane=None) == backend("udp", SourceCheck="true")
    one, here = backend("udp", Port=9000, DataPlane="python", SourceCheck="strict"), host(1)
    own, peer = (published_record(one, host(n), n) for n in (1, 2))
    found = one.desired(own, [peer], here)
    pump = found.pumps["flannel0"]
    assert (pump.port, pump.plane, pump.source_check) == (9000, "python", "strict")
    # Records do not tell: all hosts must use the same.
    assert {end.port for end in found.tunnel.values()} == {9000}


@pytest.mark.parametrize(
    "option",
    [{"Port": 65536}, {"Port": "8285"}, {"DataPlane": "fast"}, {"SourceCheck": "yes"}, {"SourceCheck": 1}],
)
def test_udp_wrong_options_are_named(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=rf"Backend\.{name} .*: expected"):
        backend("udp", **option)


@pytest.mark.parametrize("check", [True, False, "true", "false"])
def test_udp_source_check_may_be_written_as_a_boolean_or_as_a_word(check: object) -> None:
    one = backend("udp", SourceCheck=check)
    own = published_record(one, host(1), 1)
    assert one.desired(own, [], host(1)).pumps["flannel0"].source_check == str(check).lower()


def test_udp_uses_the_device_that_is_ours() -> None:
    one, here, (own, _) = network("udp", 2)
    found = one.desired(own, [], replace(here, tun="flannel3"))
    assert set(found.links) == set(found.pumps) == {dev for dev, _ in found.addrs} == {"flannel3"}
