"""What flannel's own tests say of addresses: T10, T13, T14 of the contract; T12 is not for these backends.

The other pure ones bear their numbers beside what they test: T01 to T04 in test_record_keys.py, T05 to
T08 in test_config.py and test_backends.py, T19 to T21 in test_hostfiles.py, T23 and T28 in test_records.py,
T29 to T31 in test_allocate.py, T35 to T39 in test_ifselect.py. T40 to T44 come with packet-filter rules.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from flanneld_py.core.config import parse_config
from flanneld_py.core.hostfiles import SubnetEnv, render_subnet_env
from flanneld_py.core.subnetchoice import overlap
from flanneld_py.core.subnets import inside
from flanneld_py.errors import ConfigError
from flanneld_py.model import IPNetwork, PerFamily, Subnets


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
    parse_config('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fc00:1::/48"}')


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
