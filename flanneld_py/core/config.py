"""The network config: the JSON document under the registry key `config`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from msgspec import Struct, field

from flanneld_py.addresses import Family, IPAddress, IPNetwork, PerFamily
from flanneld_py.core import gojson
from flanneld_py.core.configkeys import misspelt, shown_key
from flanneld_py.errors import ConfigError
from flanneld_py.model import NetworkConfig, SubnetRange

EXAMPLE = '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'
DEFAULT_BACKEND = "udp"
"""Of a config without `Backend`, as flannel's code has it (its documentation says vxlan)."""
MIN_SUBNETS_BITS = 2
"""A Network holds at least four subnets."""


class _Limits(Struct, frozen=True):
    prefix: str
    """What the field names of this family begin with."""
    network: str
    """An example."""
    default_len: int
    max_len: int


_LIMITS: dict[Family, _Limits] = {
    4: _Limits("", "10.5.0.0/16", 24, 30),
    6: _Limits("IPv6", "fd00:5::/48", 64, 126),
}


def parse_config(text: str | bytes) -> NetworkConfig:
    """Check the document and fill in the defaults, as flannel does for etcd; it reads the keys like Go.

    Stricter than flannel where its acceptance only postpones the failure: an IPv4 network in IPv6Network,
    and a SubnetMax below SubnetMin.

    Raises:
        ConfigError: which field, its value, what was expected and what to do.
    """
    fields, unknown, doubts = _read_fields(_load(text))
    try:
        ranges: PerFamily[SubnetRange] = PerFamily(
            _range(4, fields) if fields["EnableIPv4"] else None,
            _range(6, fields) if fields["EnableIPv6"] else None,
        )
    except ConfigError as error:
        raise ConfigError("; ".join([str(error), *misspelt(unknown)])) from None
    if not ranges.values():
        raise ConfigError(
            "EnableIPv4 and EnableIPv6 are both false: expected at least one true; remove EnableIPv4 "
            "or set EnableIPv6 to true"
        )
    backend: _Backend = fields["Backend"]
    return NetworkConfig(
        ranges,
        backend.type,
        backend.options,
        fields["EnableNFTables"],
        unknown,
        backend.spelling,
        (*doubts, *backend.doubts),
    )


def _load(text: str | bytes) -> dict[str, Any]:
    try:
        document = gojson.load(text)
    except ValueError as error:
        raise ConfigError(f"the config is {error}; store a JSON object such as {EXAMPLE}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"the config is {gojson.show(document)}: expected a JSON object such as {EXAMPLE}")
    return document


# --- fields ---------------------------------------------------------------------------------------


class _Backend(Struct, frozen=True):
    """The value of `Backend`; option keys in lower case."""

    type: str = DEFAULT_BACKEND
    options: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def _read_fields(document: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Every field's value or default, the keys that name no field, and what is hardly meant."""
    fields: dict[str, Any] = {
        "EnableIPv4": True,
        "EnableIPv6": False,
        "EnableNFTables": False,
        "Backend": _Backend(),
    }
    unknown: dict[str, None] = {}
    given: dict[str, list[str]] = {}
    for key, value in gojson.members(document):
        name, read = _FIELDS.get(key.casefold(), ("", None))
        if read is None:
            unknown[key] = None
            continue
        given.setdefault(name, []).append(key)
        if value is None and read in (_boolean, _subnet_len):
            continue  # Go leaves such a field as it was
        fields[name] = read(name, value)
    return fields, tuple(unknown), (*_repeated(given), *_void(given))


def _repeated(given: Mapping[str, list[str]], where: str = "") -> Iterator[str]:
    """`given`: name → the keys that are it, as spelled."""
    for name, keys in given.items():
        if len(keys) > 1:
            spelled = ", ".join(map(shown_key, dict.fromkeys(keys)))
            yield (
                f"{where}{shown_key(name)} is given {len(keys)} times ({spelled}), the last one counts; "
                "remove the others"
            )


def _void(given: Mapping[str, list[str]]) -> Iterator[str]:
    if "EnableIPv6" not in given:
        for name in given:
            if name.startswith(_LIMITS[6].prefix):
                yield f'{name} has no effect without "EnableIPv6": true; add that, or remove it'


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{name} {gojson.show(value)}: expected {expected}; correct or remove it")


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _wrong(name, value, "true or false, without quotes")
    return value


def _subnet_len(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _wrong(name, value, "a prefix length such as 24, a whole number without quotes")
    return value


def _network_v4(name: str, value: Any) -> IPv4Network:
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+/[0-9]+", value):
        try:
            network = IPv4Network(value, strict=False)
        except ValueError:
            pass
        else:
            if network.is_loopback or network.is_multicast or network.is_link_local:
                raise _wrong(name, value, "a network whose addresses can be routed between hosts")
            return network
    raise _wrong(name, value, f'an IPv4 network such as "{_LIMITS[4].network}"')


def _network_v6(name: str, value: Any) -> IPv6Network:
    if isinstance(value, str) and re.fullmatch(r"[0-9A-Fa-f:.]+/[0-9]+", value):
        try:
            network = IPv6Network(value, strict=False)
        except ValueError:
            pass
        else:
            if network.network_address.ipv4_mapped is None:
                return network
    raise _wrong(name, value, f'an IPv6 network such as "{_LIMITS[6].network}"')


def _address_v4(name: str, value: Any) -> IPv4Address:
    if isinstance(value, str):
        try:
            return IPv4Address(value)
        except ValueError:
            pass
    raise _wrong(name, value, 'an IPv4 address such as "10.5.1.0"')


def _address_v6(name: str, value: Any) -> IPv6Address:
    if value is None:
        return IPv6Address(0)
    if isinstance(value, str) and "%" not in value:
        try:
            return IPv6Address(value)
        except ValueError:
            pass
    raise _wrong(name, value, 'an IPv6 address such as "fd00:5:0:1::"')


def _backend(name: str, value: Any) -> _Backend:
    """Its type in lower case, and the other keys in lower case; a null does not undo an earlier value."""
    if not isinstance(value, dict):
        raise ConfigError(f'{name} {gojson.show(value)}: expected an object such as {{"Type": "vxlan"}}')
    options: dict[str, Any] = {}
    given: dict[str, list[str]] = {}
    backend_type = None
    for spelled, option in gojson.members(value):
        key = spelled.casefold()
        given.setdefault(key, []).append(spelled)
        if key == "type":
            backend_type = backend_type if option is None else _backend_type(f"{name}.Type", option)
        elif option is not None or key not in options:
            options[key] = option
    if backend_type is None:
        hints = misspelt([keys[0] for keys in given.values()], ["Type"], f"{name}.")
        raise ConfigError("; ".join([f'{name} has no Type: add one, such as {{"Type": "vxlan"}}', *hints]))
    spelling = {key: keys[-1] for key, keys in given.items()}
    named = {keys[0]: keys for keys in given.values()}
    return _Backend(backend_type, options, spelling, tuple(_repeated(named, f"{name}.")))


def _backend_type(name: str, value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
        return value.lower()
    raise _wrong(name, value, 'the name of a backend, such as "vxlan"')


_FIELDS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    name.lower(): (name, read)
    for name, read in {
        "EnableIPv4": _boolean,
        "EnableIPv6": _boolean,
        "EnableNFTables": _boolean,
        "Network": _network_v4,
        "SubnetLen": _subnet_len,
        "SubnetMin": _address_v4,
        "SubnetMax": _address_v4,
        "IPv6Network": _network_v6,
        "IPv6SubnetLen": _subnet_len,
        "IPv6SubnetMin": _address_v6,
        "IPv6SubnetMax": _address_v6,
        "Backend": _backend,
    }.items()
}


# --- ranges ---------------------------------------------------------------------------------------


def _range(family: Family, fields: Mapping[str, Any]) -> SubnetRange:
    limits = _LIMITS[family]
    name = f"{limits.prefix}Network"
    network: IPNetwork | None = fields.get(name)
    if network is None or network.prefixlen == 0:
        raise ConfigError(
            f"{name} is {'missing' if network is None else network}: expected a network such as "
            f'"{limits.network}"; add it, or set EnableIPv{family} to false'
        )
    length = _length(limits, network, fields.get(f"{limits.prefix}SubnetLen", 0))
    size = 1 << network.max_prefixlen - length
    first, last = network[0], network[-1] - (size - 1)
    subnet_min = _bound(f"{limits.prefix}SubnetMin", fields, network, length) or first + size
    subnet_max = _bound(f"{limits.prefix}SubnetMax", fields, network, length) or last
    if int(subnet_max) < int(subnet_min):
        raise ConfigError(
            f"{limits.prefix}SubnetMax {subnet_max} lies below {limits.prefix}SubnetMin {subnet_min}: "
            "expected a range with at least one subnet; set both, the lower one as the minimum"
        )
    return SubnetRange(network, length, subnet_min, subnet_max)


def _length(limits: _Limits, network: IPNetwork, given: int) -> int:
    widest = limits.max_len - MIN_SUBNETS_BITS
    lowest = network.prefixlen + MIN_SUBNETS_BITS
    if network.prefixlen > widest:
        raise ConfigError(
            f"{limits.prefix}Network {network}: expected /{widest} or larger, to hold four subnets of "
            f"/{limits.max_len} or larger; choose a larger network"
        )
    if given and not lowest <= given <= limits.max_len:
        raise ConfigError(
            f"{limits.prefix}SubnetLen {given} in {limits.prefix}Network {network}: expected a prefix length "
            f"from {lowest} (four subnets) to {limits.max_len}; change it, or remove it for the default"
        )
    return given or max(limits.default_len, lowest)


def _bound(name: str, fields: Mapping[str, Any], network: IPNetwork, length: int) -> IPAddress | None:
    """SubnetMin or SubnetMax; None when it is absent or unspecified."""
    given: IPAddress | None = fields.get(name)
    if given is None or given.is_unspecified:
        return None
    if given not in network:
        raise ConfigError(f"{name} {given}: expected an address in {network}; correct or remove it")
    base = type(network)((int(given), length), strict=False).network_address
    if given != base:
        raise ConfigError(
            f"{name} {given}: expected the base of a /{length} subnet such as {base}; correct it"
        )
    return given
