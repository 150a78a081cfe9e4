"""flannelctl config: the network config in etcd, checked before it is written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import click

from flanneld_py.addresses import IPAddress, IPNetwork, PerFamily
from flanneld_py.backends import backend_of
from flanneld_py.backends.base import Backend, options_of
from flanneld_py.cli.ctl.consequence import config_in_force, consequence, too_narrow
from flanneld_py.cli.ctl.control import NoAnswer, ask
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.status import checked as checked_status
from flanneld_py.cli.ctl.status import other_prefix
from flanneld_py.cli.ctl.text import count
from flanneld_py.core.config import EXAMPLE, parse_config
from flanneld_py.core.configchange import is_like_a_lease, overlaps_of
from flanneld_py.core.configkeys import unknown_keys
from flanneld_py.core.hostfiles import parse_subnet_env
from flanneld_py.core.ifselect import is_of_overlay
from flanneld_py.core.records import CONFIG_KEY
from flanneld_py.core.statefile import parse_state
from flanneld_py.core.subnets import inside
from flanneld_py.daemon.firstchoice import literal_addresses
from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.errors import ConfigError, FlanneldError, UsageError
from flanneld_py.model import External, Host, NetworkConfig, SubnetRange

NOT_FOR_PODS = 3
"""IPv4 addresses of a subnet that no pod can have: base (the VTEP's), bridge, broadcast."""
ETHERNET = 1500


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
@click.option("--force", is_flag=True, help="Write it although something about it is doubtful.")
@with_settings
def set_(settings: Settings, source: str, force: bool) -> int:
    """Check a config and write it to etcd.

    From a file, from standard input (-), or given literally:

    flannelctl config set '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'

    Refused without --force: keys that mean nothing, a Network that contains an address or gateway of this
    host, or an etcd endpoint, and fewer subnets than hosts that hold leases.

    Says what the hosts make of it, compared with the config that is in force on this one. While hosts of Go
    flannel take part, a new VNI, Port or Type is pending, as they read a config at their start only.
    """
    text = _read(source)
    checked = parse_config(text)
    _weigh(doubts_about(settings, checked, backend_of(checked)), force=force)
    registry = settings.registry()
    before, in_force = registry.list(), config_in_force(settings)
    _weigh(too_narrow(before, checked), force=force)
    written = registry.put(CONFIG_KEY, text)
    told = consequence(before, checked, in_force)
    click.echo(f"{settings.config_name} written at revision {written.revision}; {told}")
    return 0


@config.command("check")
@click.argument("source", metavar="[FILE|-|JSON]", required=False)
@with_settings
def check(settings: Settings, source: str | None) -> int:
    """Say what a config means; by default the one in etcd. Exit 1 if something is wrong or doubtful."""
    checked = parse_config(_stored(settings) if source is None else _read(source))
    backend = backend_of(checked)
    click.echo("\n".join(explain(checked, backend)))
    doubts = list(doubts_about(settings, checked, backend))
    for line in doubts:
        click.echo(f"flannelctl: {line}", err=True)
    return 1 if doubts else 0


@config.command("apply")
@with_settings
def apply(settings: Settings) -> int:
    """Take over a pending config on this host.

    As a restart of the daemon would. When the host gets another subnet, its containers must be restarted;
    with another Network, hosts that have not applied it are cut off from this one until they do.
    Exit 1: nothing is pending, the host could get no lease, no daemon runs, or only that of another prefix.
    """
    try:
        _require_our_daemon(settings)
        click.echo(ask(settings.control_socket, "apply-config"))
    except NoAnswer as error:
        raise error.with_advice from None
    return 0


def _require_our_daemon(settings: Settings) -> None:
    """Raise FlanneldError if the daemon with this subnet file is that of another prefix."""
    status = checked_status(ask(settings.control_socket, "status"), settings.control_socket)
    if status["prefix"] != settings.prefix:
        raise FlanneldError(f"{other_prefix(status, settings)}; nothing was applied")


def _stored(settings: Settings) -> bytes:
    registry = settings.registry()
    entry = registry.get(CONFIG_KEY)
    if entry is not None:
        return entry.value
    compact = EXAMPLE.replace(" ", "")
    raise ConfigError(
        f"no network config at {settings.config_name}; store one, such as: "
        f"{settings.etcd().config_set_line(compact)} (or: {registry.put_line(settings.config_name, compact)})"
    )


def _read(source: str) -> str:
    """The text of FILE, of standard input, or the argument itself when it is an object."""
    if source.lstrip().startswith("{"):
        return source.strip()
    if not source:
        raise UsageError("'': expected a file, - or a JSON object")
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}; expected a file, - or a JSON object") from None
    try:
        return data.decode().strip()
    except UnicodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text: {error}") from None


def _weigh(doubts: Iterable[str], *, force: bool) -> None:
    """Say them all, and raise ConfigError unless they are overruled."""
    lines = list(doubts)
    if lines and not force:
        raise ConfigError(f"{'; '.join(lines)}; nothing was written (--force writes it all the same)")
    for line in lines:
        click.echo(f"flannelctl: {line}", err=True)


# --- doubts ---------------------------------------------------------------------------------------


def doubts_about(settings: Settings, checked: NetworkConfig, backend: Backend) -> Iterator[str]:
    """What is allowed and hardly meant: unknown keys, and a Network that is in use here already."""
    # The kernel is asked by a module that takes 10 ms.
    from flanneld_py.drivers.kernel import read_host  # noqa: PLC0415

    yield from unknown_keys(checked, backend.keys)
    yield from checked.doubts
    facts = read_host()
    own, networks = _ours(settings)
    yield from overlaps_of(
        checked.networks,
        addresses=[
            held.address.ip
            for link in facts.links
            for held in link.addresses
            if not is_of_overlay(link)
            # The containers' bridge may be that of an earlier subnet until they are restarted.
            and not (
                link.kind == "bridge"
                and is_like_a_lease(held.address.network, checked)
                and any(inside(held.address.ip, net) for net in networks)
            )
        ],
        gateways=facts.gateways,
        registry=literal_addresses(settings.endpoints),
        own=own,
    )


def _ours(settings: Settings) -> tuple[list[IPNetwork], list[IPNetwork]]:
    """This host's subnets and Networks, as far as the daemon's files tell: each of them may be missing."""
    file = parse_subnet_env(read_regular(settings.subnet_file) or "")
    subnets, networks = [*file.subnets.values()], [*file.networks.values()]
    with suppress(OSError):  # root's only
        saved = parse_state(read_regular(settings.state_file) or "")
        if saved is not None and saved.prefix == settings.prefix:
            subnets += saved.subnets.values()
            networks += saved.networks
    return subnets, networks


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
    port = options_of(backend).get("port")
    if port:
        yield f"to be open     UDP {port} between the hosts"


def _subnets(scope: SubnetRange) -> str:
    bits = scope.network.max_prefixlen - scope.subnet_len
    hosts = (int(scope.subnet_max) - int(scope.subnet_min) >> bits) + 1
    pods = f"{(1 << bits) - NOT_FOR_PODS}" if scope.network.version == 4 else f"2^{bits}"
    return f"{hosts} of /{scope.subnet_len}: room for {count(hosts, 'host')}, {pods} pod addresses on each"


def _nth(scope: SubnetRange, base: object) -> str:
    return f"{base}/{scope.subnet_len}"


def _options(backend: Backend) -> Iterator[tuple[str, Any]]:
    for name, value in options_of(backend).items():
        if name != "external_mtu":
            yield name.replace("_", " "), str(value).lower() if isinstance(value, bool) else value


def _mtu(checked: NetworkConfig, backend: Backend) -> str:
    """The overhead as the backend itself reckons it, on imagined interfaces."""
    given = options_of(backend).get("external_mtu", 0)
    try:
        ethernet, most = (backend.mtu(_imagined(checked, mtu)) for mtu in (ETHERNET, given or ETHERNET))
    except FlanneldError as error:
        return str(error)
    overhead = (given or ETHERNET) - most
    own = f"the interface's less {overhead}" if overhead else "the interface's"
    if not given:
        return f"{own} ({ethernet} on Ethernet)" if overhead else own
    on_ethernet = f": {ethernet} on Ethernet" if ethernet < most else ""
    return f"{most}, or {own} where that is smaller{on_ethernet}"


def _imagined(checked: NetworkConfig, mtu: int) -> Host:
    """A host that has what a backend may ask for, with addresses meant for documentation (RFC 5737, 3849)."""
    addresses: PerFamily[IPAddress] = PerFamily(
        IPv4Address("192.0.2.1") if checked.ranges.v4 else None,
        IPv6Address("2001:db8::1") if checked.ranges.v6 else None,
    )
    return Host("", "", External("", mtu, addresses, addresses))
