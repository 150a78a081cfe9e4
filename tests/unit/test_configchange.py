"""Changes of the network config: in force at once, or pending with the reason."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from flanneld_py.addresses import PerFamily, Subnets
from flanneld_py.backends import backend_of
from flanneld_py.backends.base import options_of
from flanneld_py.core.config import parse_config
from flanneld_py.core.configchange import Settings, overlaps_of, pending_reasons

OWN: Subnets = PerFamily(ip_network("10.5.34.0/24"), ip_network("fd00:5:0:34::/64"))
DUAL = {"EnableIPv6": True, "IPv6Network": "fd00:5::/48"}


def settings(**fields: Any) -> Settings:
    config = parse_config(
        json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}, **DUAL, **fields})
    )
    return Settings(config, options_of(backend_of(config)))


def reasons(fields: dict[str, Any], own: Subnets | None = OWN, foreign: tuple[str, ...] = ()) -> str:
    return "; ".join(pending_reasons(settings(), settings(**fields), own, foreign))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"Backend": {"Type": "vxlan", "MTU": 1400}},
        {"Backend": {"Type": "vxlan", "TxChecksum": "off"}},
        {"Backend": {"Type": "vxlan", "Learning": True, "DirectRouting": True}},
        {"Backend": {"Type": "vxlan", "VNI": 1, "Port": 8472}},
        {"SubnetMin": "10.5.34.0", "SubnetMax": "10.5.34.0"},
        {"IPv6SubnetMin": "fd00:5:0:30::", "IPv6SubnetMax": "fd00:5:0:40::"},
        {"SubnetLen": 24, "EnableNFTables": True, "Unknown": 1},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("foreign", [(), ("10.5.9.0-24",)])
def test_live_whoever_takes_part(fields: dict[str, Any], foreign: tuple[str, ...]) -> None:
    assert reasons(fields, foreign=foreign) == ""


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ({"Type": "vxlan", "VNI": 7}, "Backend.VNI 1 becomes 7"),
        ({"Type": "vxlan", "Port": 4789}, "Backend.Port 8472 becomes 4789"),
        ({"Type": "vxlan", "GBP": True}, "Backend.GBP False becomes True"),
        ({"Type": "host-gw"}, "Backend.Type vxlan becomes host-gw"),
    ],
)
def test_what_hosts_have_in_common_is_live_among_ours_only(backend: dict[str, Any], reason: str) -> None:
    assert reasons({"Backend": backend}) == ""
    told = reasons({"Backend": backend}, foreign=("10.5.9.0-24", "10.5.8.0-24"))
    assert told == f"{reason}: hosts of flannel would not follow (10.5.8.0-24 and 1 more)"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Network": "10.6.0.0/16"}, "Network 10.5.0.0/16 becomes 10.6.0.0/16"),
        ({"SubnetLen": 25}, "SubnetLen 24 becomes 25"),
        ({"SubnetMin": "10.5.35.0"}, "SubnetMin and SubnetMax become 10.5.35.0 and 10.5.255.0: 10.5.34.0/24"),
        ({"SubnetMax": "10.5.33.0"}, "10.5.34.0/24 of this host lies outside"),
        ({"IPv6Network": "fd00:6::/48"}, "IPv6Network fd00:5::/48 becomes fd00:6::/48"),
        ({"IPv6SubnetLen": 68}, "IPv6SubnetLen 64 becomes 68"),
        ({"IPv6SubnetMin": "fd00:5:0:35::"}, "IPv6SubnetMin and IPv6SubnetMax"),
        ({"EnableIPv6": False}, "EnableIPv6 becomes false"),
        ({"EnableIPv4": False}, "EnableIPv4 becomes false"),
    ],
)
def test_pending_while_a_lease_is_held(fields: dict[str, Any], reason: str) -> None:
    assert reason in reasons(fields)
    assert reasons(fields, own=None) == "", "without a lease there is nothing to lose"


def test_every_reason_is_told() -> None:
    told = reasons({"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7}}, foreign=("a",))
    assert "Network" in told
    assert "Backend.VNI" in told


def test_what_a_network_must_not_contain() -> None:
    networks = [ip_network("10.5.0.0/16"), ip_network("fd00:5::/48")]
    addresses = [ip_address(text) for text in ("10.5.34.1", "10.5.9.9", "192.0.2.1", "fd00:5::9")]
    assert list(
        overlaps_of(
            networks,
            addresses=addresses,
            gateways=[ip_address("10.5.0.1")],
            registry=[ip_address("10.5.0.2"), ip_address("192.0.2.254")],
            own=[ip_network("10.5.34.0/24")],
        )
    ) == [
        "Network 10.5.0.0/16 contains this host's address 10.5.9.9",
        "Network 10.5.0.0/16 contains this host's gateway 10.5.0.1",
        "Network 10.5.0.0/16 contains the etcd endpoint 10.5.0.2",
        "Network fd00:5::/48 contains this host's address fd00:5::9",
    ]
