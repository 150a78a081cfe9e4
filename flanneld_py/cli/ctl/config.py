"""flannelctl config: the network config in etcd, checked before it is written."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import click

from flanneld_py.backends import backend_of
from flanneld_py.backends.base import Backend
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.text import count, printable
from flanneld_py.core import options
from flanneld_py.core.config import EXAMPLE, parse_config
from flanneld_py.core.records import CONFIG_KEY
from flanneld_py.errors import ConfigError, FlanneldError, UsageError
from flanneld_py.model import External, Host, IPAddress, NetworkConfig, PerFamily, SubnetRange

FIELDS = (
    *("EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend"),
    *("Network", "SubnetLen", "SubnetMin", "SubnetMax"),
    *("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"),
)
"""What core/config.py reads."""
NOT_FOR_PODS = 3
"""IPv4 addresses of a subnet that no pod can have: base (the VTEP's), bridge, broadcast."""
ETHERNET, JUMBO = 1500, 9000


@click.group()
def config() -> None:
    """The network config, which all hosts share."""


@config.command("get")
@with_settings
def get(settings: Settings) -> int:
    """Print the config as stored. Exit 1 if there is none, 75 if etcd is not reached."""
    text = _stored(settings)
    click.echo(text, nl=not text.endswith(b"\n"))
    return 0


@config.command("set")
@click.argument("source", metavar="FILE|-|JSON")
@click.option("--force", is_flag=True, help="Write it although it has unknown keys.")
@with_settings
def set_(settings: Settings, source: str, force: bool) -> int:
    """Check a config and write it to etcd.

    From a file, from standard input (-), or given literally:

    flannelctl config set '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'
    """
    text = _read(source)
    checked = parse_config(text)
    strangers = list(unknown_keys(checked, backend_of(checked)))
    if strangers and not force:
        raise ConfigError(f"{'; '.join(strangers)}; nothing was written (--force writes it all the same)")
    for line in strangers:
        click.echo(f"flannelctl: {line}", err=True)
    written = settings.registry().put(CONFIG_KEY, text)
    click.echo(
        f"{settings.config_name} written at revision {written.revision}; "
        "daemons that have a config already apply it when they are restarted"
    )
    return 0


@config.command("check")
@click.argument("source", metavar="[FILE|-|JSON]", required=False)
@with_settings
def check(settings: Settings, source: str | None) -> int:
    """Say what a config means; by default the one in etcd. Exit 1 if it is wrong or has unknown keys."""
    checked = parse_config(_stored(settings) if source is None else _read(source))
    backend = backend_of(checked)
    click.echo("\n".join(explain(checked, backend)))
    strangers = list(unknown_keys(checked, backend))
    for line in strangers:
        click.echo(f"flannelctl: {line}", err=True)
    return 1 if strangers else 0


def _stored(settings: Settings) -> bytes:
    registry = settings.registry()
    entry = registry.get(CONFIG_KEY)
    if entry is not None:
        return entry.value
    compact = EXAMPLE.replace(" ", "")
    raise ConfigError(
        f"no network config at {settings.config_name}; store one, such as: ETCDCTL_API=3 etcdctl "
        f"--endpoints={registry.endpoint} put {shlex.quote(settings.config_name)} {shlex.quote(compact)} "
        "(or check and store it with `flannelctl config set`)"
    )


def _read(source: str) -> str:
    """The text of FILE, of standard input, or the argument itself when it is an object."""
    if source.lstrip().startswith("{"):
        return source.strip()
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}; expected a file, - or a JSON object") from None
    try:
        return data.decode().strip()
    except UnicodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text: {error}") from None


# --- unknown keys ---------------------------------------------------------------------------------


def unknown_keys(checked: NetworkConfig, backend: Backend) -> Iterator[str]:
    """A line for each key that no daemon reads, with the nearest name that one would."""
    top = options.unknown({key.casefold(): None for key in checked.unknown_keys}, FIELDS)
    spelled = {key.casefold(): key for key in checked.unknown_keys}
    for key, nearest in top.items():
        yield _stranger(spelled[key], nearest)
    known = vars(sys.modules[type(backend).__module__])["KEYS"]
    for key, nearest in options.unknown(checked.backend_options, known).items():
        yield _stranger(f"Backend.{key}", nearest and f"Backend.{nearest}")


def _stranger(key: str, nearest: str) -> str:
    return f"unknown key {printable(key)}" + (f": did you mean {nearest}?" if nearest else "")


# --- meaning --------------------------------------------------------------------------------------


def explain(checked: NetworkConfig, backend: Backend) -> Iterator[str]:
    """What daemons will make of it, line by line."""
    for family, scope in checked.ranges.items():
        yield f"IPv{family} network   {scope.network}"
        yield f"  subnets      {_subnets(scope)}"
        yield f"  from, to     {_nth(scope, scope.subnet_min)}, {_nth(scope, scope.subnet_max)}"
    settings = ", ".join(f"{name} {value}" for name, value in _options(backend))
    yield f"backend        {backend.type}" + (f": {settings}" if settings else "")
    yield f"MTU            {_mtu(checked, backend)}"


def _subnets(scope: SubnetRange) -> str:
    bits = scope.network.max_prefixlen - scope.subnet_len
    hosts = (int(scope.subnet_max) - int(scope.subnet_min) >> bits) + 1
    pods = f"{(1 << bits) - NOT_FOR_PODS}" if scope.network.version == 4 else f"2^{bits}"
    return f"{hosts} of /{scope.subnet_len}: room for {count(hosts, 'host')}, {pods} pod addresses on each"


def _nth(scope: SubnetRange, base: object) -> str:
    return f"{base}/{scope.subnet_len}"


def _options(backend: Backend) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(backend):
        return
    for field in dataclasses.fields(backend):
        if field.name not in ("type", "families", "external_mtu"):
            value = getattr(backend, field.name)
            yield field.name, str(value).lower() if isinstance(value, bool) else value


def _mtu(checked: NetworkConfig, backend: Backend) -> str:
    """The overhead as the backend itself reckons it, on two imagined interfaces."""
    try:
        small, large = (backend.mtu(_imagined(checked, mtu)) for mtu in (ETHERNET, JUMBO))
    except FlanneldError as error:
        return str(error)
    if small == large:
        return f"{small}, whatever the interface's"
    overhead = ETHERNET - small
    return f"the interface's less {overhead} ({small} on Ethernet)" if overhead else "the interface's"


def _imagined(checked: NetworkConfig, mtu: int) -> Host:
    """A host that has what a backend may ask for, with addresses meant for documentation (RFC 5737, 3849)."""
    addresses: PerFamily[IPAddress] = PerFamily(
        IPv4Address("192.0.2.1") if checked.ranges.v4 else None,
        IPv6Address("2001:db8::1") if checked.ranges.v6 else None,
    )
    return Host("", "", External("", mtu, addresses, addresses))
