"""Docker's options from subnet.env, in the very lines of flannel's mk-docker-opts.sh."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from ipaddress import IPv4Interface, IPv4Network

from flanneld_py.core.hostfiles import parse_environment_file
from flanneld_py.errors import FlanneldError, UsageError

DEFAULT_KEY = "DOCKER_OPTS"
MARK = "DOCKER_OPT_"
"""In the name of every variable that holds one option, ours and those that were there before."""
NEGATED = {"true": "false", "false": "true"}
"""FLANNEL_IPMASQ → Docker's --ip-masq: what flannel masquerades, Docker need not."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RTF_GATEWAY = 0x2


def read_variables(environ: Mapping[str, str], text: str) -> dict[str, str]:
    """What a shell would know after it sourced subnet.env; nothing of it is executed."""
    found = dict(environ)
    for name, value in parse_environment_file(text).items():
        found[name] = value.partition("#")[0].strip() if name.startswith("FLANNEL_") else value
    return found


def render_docker_opts(
    variables: Mapping[str, str],
    *,
    key: str = DEFAULT_KEY,
    individual: bool = True,
    combined: bool = True,
    ipmasq: bool = True,
) -> str:
    """The text of the file for Docker's service.

    Args:
        variables: those of subnet.env and of the environment.
        key: of the combined line; its value until now stands before the options.
        individual: with a line for each DOCKER_OPT_ variable.
        combined: with one line for all.
        ipmasq: with --ip-masq.

    Raises:
        UsageError: `key` is no name of a variable.
        FlanneldError: FLANNEL_IPMASQ is neither true nor false.
    """
    if not _NAME.fullmatch(key):
        raise UsageError(f"-k {key!r}: expected the name of a variable, such as {DEFAULT_KEY}")
    options = {name: value for name, value in variables.items() if MARK in name and _NAME.fullmatch(name)}
    options |= _own_options(variables, ipmasq=ipmasq)
    values = [options[name] for name in sorted(options)]
    lines = [_assignment(name, options[name]) for name in sorted(options)] if individual else []
    if combined:
        before = f"{variables[key]} " if variables.get(key) else ""
        lines.append(_assignment(key, before + "".join(f" {value}" for value in values)))
    return "".join(lines)


def _own_options(variables: Mapping[str, str], *, ipmasq: bool) -> dict[str, str]:
    subnet, masq, mtu = (variables.get(f"FLANNEL_{name}", "") for name in ("SUBNET", "IPMASQ", "MTU"))
    options = {}
    if subnet:
        options[f"{MARK}BIP"] = f"--bip={subnet}"
    if masq and ipmasq:
        if masq not in NEGATED:
            raise FlanneldError(f"FLANNEL_IPMASQ={masq}: expected true or false; restart the flannel daemon")
        options[f"{MARK}IPMASQ"] = f"--ip-masq={NEGATED[masq]}"
    if mtu:
        options[f"{MARK}MTU"] = f"--mtu={mtu}"
    return options


def _assignment(name: str, value: str) -> str:
    """As systemd and a shell read it back: both know these four escapes between double quotes."""
    escaped = re.sub(r'[\\"`$]', r"\\\g<0>", value)
    return f'{name}="{escaped}"\n'


def find_gateway(subnet: str, table: str) -> str | None:
    """Through which gateway this host sends to its own subnet, if it does: the subnet is another host's then.

    Args:
        subnet: FLANNEL_SUBNET, such as `10.5.34.1/24`.
        table: the text of /proc/net/route, which is table main.
    """
    try:
        network = IPv4Interface(subnet).network
    except ValueError:
        return None
    for row in table.splitlines()[1:]:
        dev, destination, gateway, flags, *_counters, mask, _mtu, _window, _rtt = row.split()
        if int(flags, 16) & _RTF_GATEWAY and IPv4Network((_packed(destination), _bits(mask))) == network:
            return f"{IPv4Interface(_packed(gateway)).ip} dev {dev}"
    return None


def _packed(word: str) -> bytes:
    """The kernel prints an address in network order as if it were a number of the host's."""
    return int(word, 16).to_bytes(4, sys.byteorder)


def _bits(mask: str) -> int:
    return int(mask, 16).bit_count()
