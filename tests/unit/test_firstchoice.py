"""Where nobody names an interface: when the one that reaches etcd is taken, and that it stays."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.firstchoice import is_undisputed, prefers_registry
from flanneld_py.model import AddressFacts, HostFacts, LinkFacts, Record, Snapshot, Way

ETCD = ip_address("10.9.0.1")


def link(name: str, address: str, mac: str = "", kind: str = "", alias: str = "") -> LinkFacts:
    facts = (AddressFacts(ip_interface(address)),)
    return LinkFacts(name, 1, 1500, mac, up=True, kind=kind, alias=alias, addresses=facts)


LO = link("lo", "127.0.0.1/8", "00:00:00:00:00:00")
WAN = link("eth0", "192.0.2.7/24", "02:00:00:00:00:01")
LAN = link("eth1", "10.9.0.7/24", "02:00:00:00:00:02")
HOST = HostFacts((LO, WAN, LAN), PerFamily("eth0"), ways={ETCD: Way("eth1", ip_address("10.9.0.7"))})
EMPTY = Snapshot(5, 1)


def snapshot(public_ip: str, node_id: str) -> Snapshot:
    record = Record("10.5.1.0-24", PerFamily(), PerFamily(ip_address(public_ip)), node_id=node_id)
    return Snapshot(5, 1, {record.key: record})


def prefers(
    facts: HostFacts = HOST, records: Snapshot = EMPTY, *, last_mac: str = "", is_fresh: bool = True
) -> bool:
    return prefers_registry(facts, ETCD, records, node_id="me", last_mac=last_mac, is_fresh=is_fresh)


def test_a_fresh_host_takes_what_reaches_etcd() -> None:
    assert prefers()
    assert prefers(records=snapshot("10.9.0.8", "another"))


def test_a_host_with_a_subnet_file_follows_the_default_route() -> None:
    assert not prefers(is_fresh=False)


@pytest.mark.parametrize("name", ["flannel.1", "flannel-v6.1", "flannel0", "flannel.ipip", "flannel-wg"])
def test_so_does_one_with_a_device_of_flannel(name: str) -> None:
    assert not prefers(replace(HOST, links=(*HOST.links, link(name, "10.5.1.0/32"))))


def test_so_does_one_with_a_device_of_another_daemon() -> None:
    assert not prefers(replace(HOST, links=(*HOST.links, link("x", "10.5.1.0/32", alias="flanneld-py:/y"))))


@pytest.mark.parametrize(
    ("public_ip", "node_id", "expected"),
    [
        ("192.0.2.7", "", False),
        ("10.9.0.7", "", False),
        ("192.0.2.7", "me", False),
        ("10.9.0.7", "me", True),
        ("10.9.0.7", "clone", False),
    ],
)
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_record_that_names_an_address_of_this_host(
    public_ip: str, node_id: str, expected: bool, is_fresh: bool
) -> None:
    assert prefers(records=snapshot(public_ip, node_id), is_fresh=is_fresh) is expected


@pytest.mark.parametrize(("mac", "expected"), [(LAN.mac, True), (WAN.mac, False)])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_the_interface_of_the_last_run_stays(mac: str, expected: bool, is_fresh: bool) -> None:
    assert prefers(last_mac=mac, is_fresh=is_fresh) is expected


def test_a_mac_that_several_share_or_nobody_has_tells_nothing() -> None:
    vlan = replace(LAN, mac=WAN.mac)
    shared = replace(HOST, links=(LO, WAN, vlan))
    assert prefers(shared, last_mac=WAN.mac)
    assert not prefers(shared, last_mac=WAN.mac, is_fresh=False)
    assert not prefers(shared, snapshot("192.0.2.7", "me"), last_mac=WAN.mac)
    assert prefers(last_mac="02:00:00:00:00:99")


@pytest.mark.parametrize("way", [None, Way("lo", ETCD), Way("gone", None), Way("flannel.1", None)])
def test_no_way_to_go_by(way: Way | None) -> None:
    facts = replace(HOST, links=(*HOST.links, link("flannel.1", "10.5.1.0/32")), ways={})
    assert not prefers(replace(facts, ways={ETCD: way}) if way else facts, snapshot("10.9.0.7", "me"))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (HOST, False),
        (replace(HOST, default_devices=PerFamily("eth1")), True),
        (replace(HOST, default_devices=PerFamily("eth1", "eth1")), True),
        (replace(HOST, default_devices=PerFamily("eth1", "eth0")), False),
        (
            replace(
                HOST, default_devices=PerFamily("eth1"), default_devices_besides=PerFamily(("eth0",))
            ),
            False,
        ),
        (replace(HOST, default_devices=PerFamily()), False),
        (replace(HOST, ways={}), False),
        (replace(HOST, ways={ETCD: Way("lo", ETCD)}), True),
    ],
)  # fmt: skip
def test_where_there_is_nothing_to_choose(facts: HostFacts, expected: bool) -> None:
    assert is_undisputed(facts, ETCD) is expected
