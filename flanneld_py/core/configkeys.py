"""The keys of the network config with their meanings; the documentation is made of this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flanneld_py.core import gojson, options
from flanneld_py.model import NetworkConfig


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the config, or of its `Backend`."""

    name: str
    default: str
    """As one would write it, or in words."""
    meaning: str


KEYS = (
    Key("Network", "required with IPv4", "IPv4 network of the whole overlay; not one that hosts are part of"),
    Key("SubnetLen", "24, or for a Network smaller than /22 its length + 2", "length of each host's subnet"),
    Key("SubnetMin", "the second subnet", "base address of the first subnet that is handed out"),
    Key("SubnetMax", "the last subnet", "base address of the last subnet that is handed out"),
    Key("IPv6Network", "required with IPv6", "IPv6 network of the whole overlay"),
    Key("IPv6SubnetLen", "64, or for a network smaller than /62 its length + 2", "the same for IPv6"),
    Key("IPv6SubnetMin", "the second subnet", "the same for IPv6"),
    Key("IPv6SubnetMax", "the last subnet", "the same for IPv6"),
    Key("EnableIPv4", "true", "whether the overlay carries IPv4; its hosts then need IPv4 addresses"),
    Key("EnableIPv6", "false", "whether it carries IPv6; its hosts then need IPv6 addresses"),
    Key(
        "EnableNFTables",
        "false",
        "make packet-filter rules by nft, not by iptables; where only one is installed, by that",
    ),
    Key("Backend", '{"Type": "udp"}', "how packets travel between hosts: its Type, and the type's own keys"),
)


def unknown_keys(config: NetworkConfig, backend_keys: Iterable[Key]) -> Iterator[str]:
    """A line for each key that nothing reads, with the nearest name that something would."""
    top = options.unknown({key.casefold(): None for key in config.unknown_keys}, [key.name for key in KEYS])
    spelled = {key.casefold(): key for key in config.unknown_keys}
    for key, nearest in top.items():
        yield _stranger(spelled[key], nearest)
    found = options.unknown(config.backend_options, [key.name for key in backend_keys])
    for key, nearest in found.items():
        yield _stranger(f"Backend.{key}", nearest and f"Backend.{nearest}")


def _stranger(key: str, nearest: str) -> str:
    shown = key if key.isprintable() else gojson.show(key)
    return f"unknown key {shown}" + (f": did you mean {nearest}?" if nearest else "")
