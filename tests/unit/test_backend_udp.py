"""What the backend udp has of its own."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address, ip_interface, ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.records import encode
from flanneld_py.datapath import Endpoint, PumpSettings, TunLink
from flanneld_py.errors import ConfigError, HostError
from flanneld_py.model import NextHop, Route, State
from tests.unit.backends import backend, network, published_record
from tests.unit.strategies import host, subnet


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
