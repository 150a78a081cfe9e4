"""What the backend vxlan has of its own."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import Family, PerFamily
from flanneld_py.errors import ConfigError
from flanneld_py.model import NextHop, Record, Route, State, VxlanLink
from tests.unit.backends import backend, data, network, published_record
from tests.unit.strategies import host, mac, underlay, vxlan


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
