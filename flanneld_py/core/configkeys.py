"""The keys of the network config with their meanings; the documentation is made of this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from msgspec import Struct

from flanneld_py.core import gojson, options
from flanneld_py.model import NetworkConfig

MOST_HINTS = 3
LONGEST_KEY = 40


class Key(Struct, frozen=True):
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
    options_there_are = [key.name for key in backend_keys]
    in_backend = {name.casefold(): f"Backend.{name}" for name in options_there_are}
    for key, nearest in _nearest(config.unknown_keys, [key.name for key in KEYS]):
        yield _stranger(key, in_backend.get(key.casefold(), nearest), "nothing reads it")
    spelled = [config.option_spelling.get(key, key) for key in config.backend_options]
    for key, nearest in _nearest(spelled, options_there_are):
        yield _stranger(key, nearest, f"{config.backend_type} has no such option", "Backend.")


def misspelt(keys: Iterable[str], names: Iterable[str] = (), where: str = "") -> list[str]:
    """Of keys as spelled, a line for each of the first few that nothing reads and that is nearly a name.

    `names`: of the keys there are; by default the config's own.
    """
    near = (pair for pair in _nearest(keys, [*names] or [key.name for key in KEYS]) if pair[1])
    return [_stranger(key, nearest, "", where) for key, nearest in islice(near, MOST_HINTS)]


def _nearest(spelled: Iterable[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    by_name = {key.casefold(): key for key in spelled}
    for key, nearest in options.unknown(dict.fromkeys(by_name), names).items():
        yield by_name[key], nearest


def _stranger(key: str, nearest: str, why: str, where: str = "") -> str:
    return f"unknown key {where}{shown_key(key)}: " + (
        f"did you mean {where}{nearest}?" if nearest else f"{why}; remove it"
    )


def shown_key(key: str) -> str:
    """A key for a message; one that only looks like a key, as JSON."""
    return key if key.isprintable() and len(key) <= LONGEST_KEY else gojson.show(key)
