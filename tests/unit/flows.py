"""The overlay's traffic, in both directions, as firewalls see it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Literal

from flanneld_py.core.drops import Flow
from flanneld_py.packetfilter import ChainKey

SUBNET, PEER = ip_address("10.5.34.0"), ip_address("10.5.7.0")
IN = Flow("from other hosts to 10.5.34.0/24", PEER, SUBNET, "flannel.1", "cni0")
OUT = Flow("from 10.5.34.0/24 to other hosts", SUBNET, PEER, "cni0", "flannel.1")
NETWORK = ip_network("10.5.0.0/16")


def key(chain: str, where: Literal["legacy", "nft"] = "legacy") -> ChainKey:
    return ChainKey(where, "ip", "filter", chain)
