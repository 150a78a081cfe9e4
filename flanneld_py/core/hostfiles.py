"""Files on the host that others read or write: subnet.env, environment files, and where ours stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import PurePosixPath

from msgspec import Struct, field

from flanneld_py.addresses import Family, IPNetwork, PerFamily, Subnets

DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"
LONGEST_SUBNET_ENV = 1 << 16
"""Characters; some 150 are usual."""
_KEYS: dict[Family, tuple[str, str]] = {
    4: ("FLANNEL_NETWORK", "FLANNEL_SUBNET"),
    6: ("FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"),
}


class SubnetEnv(Struct, frozen=True):
    """What subnet.env tells container runtimes; as read back from an old file, any part may be absent."""

    networks: Subnets = field(default_factory=PerFamily)
    subnets: Subnets = field(default_factory=PerFamily)
    mtu: int = 0
    """Bytes; 0: absent."""
    ipmasq: bool = False


def render_subnet_env(env: SubnetEnv) -> str:
    """The text of subnet.env, each subnet as its first host address with the prefix length."""
    lines = []
    for family, (network_key, subnet_key) in _KEYS.items():
        network, subnet = env.networks.get(family), env.subnets.get(family)
        if network is not None and subnet is not None:
            lines += [f"{network_key}={network}", f"{subnet_key}={subnet[1]}/{subnet.prefixlen}"]
    lines += [f"FLANNEL_MTU={env.mtu}", f"FLANNEL_IPMASQ={'true' if env.ipmasq else 'false'}"]
    return "".join(f"{line}\n" for line in lines)


def parse_subnet_env(text: str) -> SubnetEnv:
    """Read a subnet.env of ours or of flannel, also a damaged one: what cannot be read is absent.

    A value may be a list; as in flannel, it counts only if exactly one network in it is valid.
    """
    if len(text) > LONGEST_SUBNET_ENV:
        return SubnetEnv()
    # A dotenv file: unlike systemd's, it may have a comment behind a value.
    values = {key: value.partition("#")[0].strip() for key, value in parse_environment_file(text).items()}
    found = {
        key: networks[0]
        for family, keys in _KEYS.items()
        for key in keys
        if len(networks := parse_networks(values.get(key, ""), family)) == 1
    }
    mtu = values.get("FLANNEL_MTU", "")
    return SubnetEnv(
        networks=PerFamily(found.get(_KEYS[4][0]), found.get(_KEYS[6][0])),
        subnets=PerFamily(found.get(_KEYS[4][1]), found.get(_KEYS[6][1])),
        mtu=int(mtu) if re.fullmatch(r"[0-9]{1,9}", mtu) else 0,
        ipmasq=values.get("FLANNEL_IPMASQ") == "true",
    )


def parse_networks(text: str, family: Family) -> tuple[IPNetwork, ...]:
    """The valid networks of a comma list, host bits masked; anything else in it is passed over."""
    kind, pattern = (
        (IPv4Network, r"[0-9.]+/[0-9]+") if family == 4 else (IPv6Network, r"[0-9A-Fa-f:.]+/[0-9]+")
    )
    networks: list[IPNetwork] = []
    for part in text.split(","):
        if re.fullmatch(pattern, part.strip()):
            try:
                networks.append(kind(part.strip(), strict=False))
            except ValueError:
                continue
    return tuple(networks)


# --- environment files ----------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"[ \t\r]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=")
_EXPORT = re.compile(r"[ \t\r]*export[ \t]")
_VALUE = re.compile(
    r"""[ \t\r]*                                # whitespace around quotes is dropped
        (?: '(?P<single>[^']*)(?:'|\Z)          # quotes may span lines
          | "(?P<double>(?:[^"\\]++|\\.|\\\Z)*+)(?:"|\Z)
          | (?P<plain>(?:[^\n\\]++|\\.|\\\Z)++)  # to the end of the line, inner quotes included
        )""",
    re.VERBOSE | re.DOTALL,
)


def parse_environment_file(text: str) -> dict[str, str]:
    """The assignments in a file of the syntax of systemd's EnvironmentFile= (systemd.exec(5)).

    `export` before a name is let pass. Comment lines begin with # or ;. Lines that assign nothing are passed
    over, and the last assignment to a name wins.
    """
    return {name: value for _, name, value in _assignments(text) if name}


def stray_lines(text: str) -> list[int]:
    """The numbers, from 1, of the lines of an environment file that assign nothing and are no comments."""
    strays, number, counted = [], 1, 0
    for begin, name, line in _assignments(text):
        number, counted = number + text.count("\n", counted, begin), begin
        if not name and line.strip() and line.strip()[0] not in "#;":
            strays.append(number)
    return strays


def exported_names(text: str) -> list[str]:
    """The names that have `export` before them, as only shells know it: systemd ignores such a line."""
    return [name for begin, name, _ in _assignments(text) if name and _EXPORT.match(text, begin)]


def _assignments(text: str) -> Iterator[tuple[int, str, str]]:
    """Where each begins, with name and value; of a line that assigns nothing the name is empty."""
    position = 0
    while position < len(text):
        begin, name, value = position, "", ""
        assignment = _ASSIGNMENT.match(text, position)
        if assignment is not None:
            name = assignment[1]
            value, position = _value(text, assignment.end())
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        yield begin, name, value if name else text[begin:end]
        position = end + 1


def _value(text: str, position: int) -> tuple[str, int]:
    """The value that begins at `position`, and where it ends. Adjacent quoted parts join."""
    parts: list[str] = []
    while (match := _VALUE.match(text, position)) is not None:
        position = match.end()
        if match["single"] is not None:
            parts.append(match["single"])
        elif match["double"] is not None:
            parts.append(re.sub(r'\\(["\\`$\n])', _unescape, match["double"]))
        else:
            parts.append(_plain(match["plain"]))
    return "".join(parts), position


def _plain(raw: str) -> str:
    """Unquoted text: a backslash protects any character, also whitespace at the end."""
    value, protected = "", 0
    for match in re.finditer(r"\\(.|\Z)|[^\\]+", raw, re.DOTALL):
        if match[1] is None:
            value += match[0]
        else:
            value += _unescape(match)
            protected = len(value)
    return value[:protected] + value[protected:].rstrip(" \t\r")


def _unescape(escape: re.Match[str]) -> str:
    return "" if escape[1] == "\n" else escape[1]


# --- places ---------------------------------------------------------------------------------------


def status_path(subnet_file: str) -> str:
    """Where the daemon of this subnet file writes its status: `status.json` beside it."""
    return _beside(subnet_file, "status.json")


def socket_path(subnet_file: str) -> str:
    """Where the daemon of this subnet file listens: `flanneld-py.sock` beside it."""
    return _beside(subnet_file, "flanneld-py.sock")


def _beside(subnet_file: str, name: str) -> str:
    path = PurePosixPath(subnet_file)
    own = "" if path.name == PurePosixPath(DEFAULT_SUBNET_FILE).name else f"{path.stem}."
    return str(path.parent / f"{own}{name}")
