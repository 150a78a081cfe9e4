"""What flannel's own tests say of addresses, by number: T10, T13 to T15.

The other pure ones bear their numbers beside what they test: T01 to T04 in test_record_keys.py, T05 to
T08 in test_config.py and test_backends.py, T09 and T11 in test_records.py, T16 in test_nodeid.py, T19 to T21
in test_hostfiles.py, T23 and T28 in test_records.py, T29 to T31 in test_allocate.py, T35 to T39 in
test_ifselect.py, T40 and T43 in test_rules.py, T47 to T53 in test_cni_*.py, T58 and T59 in
test_docker_opts.py. Those with etcd or a kernel are in tests/netns/test_flannel_behaviours.py, T41, T42, T44
and T45 in tests/netns/test_packet_rules.py.

T12 asks whether an IPv6 address is private, which only clouds need. A negative TTL (T28) is no error here:
such a key is a reservation.
"""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import IPNetwork, PerFamily, Subnets
from flanneld_py.core.config import parse_config
from flanneld_py.core.hostfiles import SubnetEnv, render_subnet_env
from flanneld_py.core.records import decode, encode
from flanneld_py.core.subnetchoice import overlap
from flanneld_py.core.subnets import inside
from flanneld_py.errors import ConfigError, RecordError
from flanneld_py.model import Entry


def subnets(text: str) -> Subnets:
    net: IPNetwork = ip_network(text)
    return PerFamily(net, None) if net.version == 4 else PerFamily(None, net)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("1.2.3.0/24", "1.2.3.0/24", True),
        ("1.2.3.0/24", "1.2.0.0/16", True),
        ("1.2.3.0/24", "1.2.4.0/24", False),
        ("1.2.3.0/24", "7.2.4.0/22", False),
    ],
)
def test_t10_overlaps(one: str, other: str, expected: bool) -> None:
    assert overlap(subnets(one), subnets(other)) is expected
    assert overlap(subnets(other), subnets(one)) is expected


@pytest.mark.parametrize(("address", "expected"), [("1.2.3.0", True), ("1.2.3.4", True), ("1.2.4.0", False)])
def test_t10_contains(address: str, expected: bool) -> None:
    assert inside(ip_address(address), ip_network("1.2.3.0/24")) is expected


def test_t13_the_whole_of_ipv6_is_no_network() -> None:
    with pytest.raises(ConfigError, match="IPv6Network is ::/0"):
        parse_config('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "::/0"}')
    for text in ("::/64", "fc00:1::/64"):
        found = parse_config(f'{{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "{text}"}}')
        assert found.networks == (ip_network(text),)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("fc00:1::/64", "fc00:1::/64", True),
        ("fc00:1::/64", "fc00::/16", True),
        ("fc00:1::/64", "fc00:2::/64", False),
        ("fc00:1::/64", "fb00:2::/48", False),
    ],
)
def test_t14_overlaps(one: str, other: str, expected: bool) -> None:
    assert overlap(subnets(one), subnets(other)) is expected


def test_t14_contains_and_first_address() -> None:
    net = ip_network("fc00:1::/64")
    assert [inside(ip_address(text), net) for text in ("fc00:1::", "fc00:1::1", "fc00:2::")] == [
        True,
        True,
        False,
    ]
    env = SubnetEnv(PerFamily(None, ip_network("fc00::/16")), PerFamily(None, net), 1500)
    assert "FLANNEL_IPV6_SUBNET=fc00:1::1/64\n" in render_subnet_env(env)


def again(v4: str, v6: str) -> str:
    """A record with these addresses, read and written."""
    value = json.dumps({"PublicIP": v4, "PublicIPv6": v6})
    return encode(decode(Entry("subnets/10.5.1.0-24&fd00:5::-64", value.encode(), 1, 1, 7)))


@given(
    st.ip_addresses(v=4).map(str) | st.text("0123456789.", max_size=15),
    st.ip_addresses(v=6).flatmap(lambda ip: st.sampled_from([str(ip), ip.exploded, ip.exploded.upper()]))
    | st.text("0123456789abcdefABCDEF:.", max_size=20),
)
def test_t15_an_address_that_was_read_reads_again_from_its_own_text(v4: str, v6: str) -> None:
    try:
        written = again(v4, v6)
    except RecordError:
        return
    fields = json.loads(written)
    assert ip_address(fields["PublicIP"]) == ip_address(v4)
    assert ip_address(fields["PublicIPv6"]) == ip_address(v6)
    assert again(fields["PublicIP"], fields["PublicIPv6"]) == written
