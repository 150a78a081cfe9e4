"""The network config, `P/config`: any JSON that somebody stored."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any

from flanneld_py.addresses import IPNetwork, PerFamily, Subnets
from flanneld_py.backends import BACKENDS, backend_of
from flanneld_py.backends.base import options_of
from flanneld_py.core.config import parse_config
from flanneld_py.core.configchange import Settings, pending_reasons
from flanneld_py.core.configkeys import KEYS, unknown_keys
from flanneld_py.core.desired import desired, subnet_env
from flanneld_py.core.freesubnets import count_free, random_free
from flanneld_py.core.records import format_key
from flanneld_py.core.reservation import is_vacant
from flanneld_py.errors import ConfigError, HostError
from flanneld_py.model import NetworkConfig, Record
from tests.fuzz.rows import BELOW, HOST
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.backends.base import Backend

FIELDS = (*(key.name for key in KEYS), "the config is")
OLD = parse_config(b'{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}')
MOST_LINES = 100
"""Of what is only odd about it."""


def check(data: bytes) -> None:
    try:
        config = parse_config(data)
        backend = backend_of(config)
    except ConfigError as error:
        one_line(error, *FIELDS)
        return
    for line in (*unknown_keys(config, backend.keys), *config.doubts):
        one_line(line)
    own = _own(config)
    settings, old = Settings(config, options_of(backend)), Settings(OLD, options_of(backend_of(OLD)))
    for line in (*pending_reasons(old, settings, own.subnets, ("10.5.9.0-24",)), *_back(old, settings)):
        one_line(line)
    _wanted(config, backend, own)


def _back(old: Settings, new: Settings) -> tuple[str, ...]:
    return pending_reasons(new, old, PerFamily(), ())


def _own(config: NetworkConfig) -> Record:
    """A lease from each range."""
    assert config.families, "no family at all"
    assert config.backend_type in BACKENDS
    subnets: dict[int, IPNetwork] = {}
    for family, allowed in config.ranges.items():
        network = allowed.network
        assert network.version == family
        assert 0 < network.prefixlen < allowed.subnet_len < network.max_prefixlen
        assert allowed.subnet_min in network
        assert allowed.subnet_max in network
        assert count_free(allowed, ()) >= 1
        subnet = random_free(allowed, (), Random(1))
        assert subnet is not None
        assert subnet.prefixlen == allowed.subnet_len
        assert int(allowed.subnet_min) <= int(subnet.network_address) <= int(allowed.subnet_max)
        assert subnet.network_address in network
        assert subnet.broadcast_address in network
        subnets[family] = subnet
    own: Subnets = PerFamily(subnets.get(4), subnets.get(6))
    return Record(format_key(own), own, HOST.external.public)


def _wanted(config: NetworkConfig, backend: Backend, own: Record) -> None:
    """What this host makes of it without a peer: rows inside the Networks, a subnet.env with an MTU."""
    try:
        mtu = backend.mtu(HOST)
        state = desired(
            backend.desired, own, (), HOST, ("/subnet.env", subnet_env(config, own, mtu, ipmasq=True))
        )
    except (ConfigError, HostError) as error:
        one_line(error)
        return
    assert BELOW <= mtu <= HOST.external.mtu
    for subnet in state.routes:
        assert subnet in config.networks, "a route without a peer"
    for _, address in state.addrs:
        assert any(address.version == net.version and address.ip in net for net in own.subnets.values())
    assert not is_vacant(own, "") or not own.node_id


def seeds() -> Iterator[bytes]:
    yield from (
        b'{"Network": "10.5.0.0/16"}',
        b'{"Network": "10.5.0.0/16", "SubnetLen": 16}',
        b'{"Network": "10.5.0.0/16", "SubnetMax": "10.9.0.0"}',
        b'{"Network": "10.5.0.0/16", "SubnetLen": 26, "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.9.0",'
        b' "Backend": {"Type": "vxlan", "VNI": 7, "Port": 4789, "DirectRouting": true, "GBP": true,'
        b' "Learning": true, "MTU": 1400, "TxChecksum": "off"}}',
        b'{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "IPv6SubnetLen": 64,'
        b' "IPv6SubnetMin": "fd00:5:0:1::", "IPv6SubnetMax": "fd00:5:0:9::", "Backend": {"Type": "host-gw"}}',
        b'{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48",'
        b' "Backend": {"Type": "udp", "Port": 8285, "SourceCheck": "loose", "DataPlane": "python"}}',
        b'{"network": "10.5.0.0/16", "NETWORK": "10.6.0.0/16", "Netwrok": 1, "EnableNFTables": true,'
        b' "Backend": {"type": "alloc", "Type": null, "Vni": 1}}',
    )
    for wrong in WRONG:
        yield json.dumps({"Network": wrong, "IPv6Network": wrong, "EnableIPv6": True}).encode()


WRONG: tuple[Any, ...] = (
    *("10.5.0.0/0", "10.5.0.0/30", "127.0.0.0/8", "10.5.0.0", "::/0", "::ffff:10.5.0.0/112"),
    *(7, None, [[[]]], {"a": "\ud800"}),
)

TARGET = Target(
    check,
    seeds,
    words=(
        *(key.name for key in KEYS),
        *("Type", "VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting", "TxChecksum"),
        *("DataPlane", "SourceCheck", *BACKENDS, "10.5.0.0/16", "fd00:5::/48", "true", "false", "null"),
    ),
)
