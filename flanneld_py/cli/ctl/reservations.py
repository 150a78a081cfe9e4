"""flannelctl leases reserve and release: a subnet for a host to come, or one that is free again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import TYPE_CHECKING, Any, TypeVar

import click
from msgspec import Struct

from flanneld_py.addresses import IPAddress, IPNetwork, PerFamily, Subnets
from flanneld_py.cli.ctl.control import ask, read_status_file
from flanneld_py.cli.ctl.leases import subnets_of
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.shape import has_shape
from flanneld_py.cli.ctl.status import SHAPE
from flanneld_py.core.config import parse_config
from flanneld_py.core.duration import duration
from flanneld_py.core.nodeid import check_node_id
from flanneld_py.core.records import SUBNETS_PREFIX, config_entry, encode, parse_key, snapshot
from flanneld_py.core.renewal import silent_in
from flanneld_py.core.reservation import is_vacant, owner_of, plan_reservation
from flanneld_py.daemon.lock import holder_of
from flanneld_py.errors import ConfigError, FlanneldError, RecordError, UsageError
from flanneld_py.model import Listing, NetworkConfig, Record

if TYPE_CHECKING:
    from flanneld_py.drivers.etcd import EtcdRegistry

ATTEMPTS = 5
"""Each time somebody else may write just then."""
A = TypeVar("A", IPv4Address, IPv6Address)


@click.command()
@click.argument("subnet", nargs=-1, required=True, metavar="SUBNET...")
@click.option("--public-ip", default="", help="IPv4 address that the host publishes.")
@click.option("--public-ipv6", default="", help="IPv6 address that it publishes.")
@click.option("--node-id", default="", help="Its node id, if the subnet is to be for no other host.")
@with_settings
def reserve(
    settings: Settings, subnet: tuple[str, ...], public_ip: str, public_ipv6: str, node_id: str
) -> int:
    """Reserve a subnet for ever.

    For a host to come, which takes it when it starts and holds no other; or for the host that holds it now,
    whose record stays as it is and ends no more. In a dual-stack network give a subnet of each family.
    """
    subnets = parse_subnets(subnet)
    addresses: PerFamily[IPAddress] = PerFamily(
        _address("--public-ip", public_ip, IPv4Address), _address("--public-ipv6", public_ipv6, IPv6Address)
    )
    if node_id:
        check_node_id(node_id)
    registry = settings.registry()
    for _ in range(ATTEMPTS):
        listing = registry.list()
        seen, config = snapshot(listing), _config(settings, listing)
        record = plan_reservation(config, seen, subnets, addresses, node_id)
        key = f"{SUBNETS_PREFIX}{record.key}"
        name = f"{settings.prefix.rstrip('/')}/{key}"
        if record.mod_revision and not record.etcd_lease:
            click.echo(f"{name} is a reservation already, for {owner_of(record)}")
            return 0
        if record.mod_revision:
            written = registry.detach(key, record.mod_revision)
        else:
            written = registry.create(key, encode(record), 0, unchanged_since=listing.revision)
        if written.ok:
            _revoke_unused(registry, record.etcd_lease)
            click.echo(f"{name} is reserved for {owner_of(record)}, since revision {written.revision}")
            _warn_of_go(record)
            return 0
    raise _too_busy()


@click.command()
@click.argument("subnet", nargs=-1, required=True, metavar="SUBNET...")
@click.option("--force", is_flag=True, help="Even if its host is alive, which then claims a subnet anew.")
@with_settings
def release(settings: Settings, subnet: tuple[str, ...], force: bool) -> int:
    """Delete a lease or reservation, so that any host may have the subnet.

    Refused without --force while its host may be alive: a lease that was renewed within the last 15 minutes
    (or three renewals), or that of a host of flannel until it ends; a reservation that a host has taken; a
    record that cannot be read. Refused always for this host while its daemon runs.
    Exit 0: done; 1: refused, or there is no such record.
    """
    wanted, registry = parse_subnets(subnet), settings.registry()
    for _ in range(ATTEMPTS):
        listing = registry.list()
        found = _find(listing, wanted)
        _require_not_ours(settings, found)
        if not force:
            _require_abandoned(registry, found, listing)
        written = registry.delete(f"{SUBNETS_PREFIX}{found.key}", found.mod_revision)
        if written.ok:
            _revoke_unused(registry, found.etcd_lease)
            name = f"{settings.prefix.rstrip('/')}/{SUBNETS_PREFIX}{found.key}"
            whose = f" of {owner_of(found.record)}" if found.record else ""
            click.echo(f"{name}{whose} released, at revision {written.revision}")
            return 0
    raise _too_busy()


# --- arguments ------------------------------------------------------------------------------------


def parse_subnets(texts: Sequence[str]) -> Subnets:
    """From `10.5.34.0/24`, `10.5.34.0/24,fd00:34::/64` or a key as in etcd; in one text or in several.

    Raises:
        UsageError: something else, or two of one family.
    """
    found: dict[int, IPNetwork] = {}
    for net in _networks(texts):
        if net.version in found:
            raise UsageError(
                f"SUBNET {net}: expected one IPv{net.version} subnet, not {found[net.version]} too"
            )
        found[net.version] = net
    if not found:
        raise UsageError("SUBNET: expected one such as 10.5.34.0/24")
    return PerFamily(found.get(4), found.get(6))


def _networks(texts: Sequence[str]) -> Iterator[IPNetwork]:
    for text in (part for whole in texts for part in whole.split(",") if part):
        try:
            if "/" in text:
                yield ip_network(text)
            else:
                yield from parse_key(text).values()
        except (ValueError, RecordError):
            raise UsageError(f"SUBNET {text!r}: expected one such as 10.5.34.0/24") from None


def _address(flag: str, text: str, kind: type[A]) -> A | None:
    try:
        return kind(text) if text else None
    except ValueError:
        family = "IPv4" if kind is IPv4Address else "IPv6"
        raise UsageError(f"{flag} {text!r}: expected an {family} address") from None


# --- what stands in etcd --------------------------------------------------------------------------


def _config(settings: Settings, listing: Listing) -> NetworkConfig:
    entry = config_entry(listing)
    if entry is None:
        raise ConfigError(
            f"no network config at {settings.config_name}: set one first (flannelctl config set)"
        )
    return parse_config(entry.value)


class _Found(Struct, frozen=True):
    """A key below `subnets/`."""

    key: str
    mod_revision: int
    etcd_lease: int
    record: Record | None
    """None if it cannot be read."""
    reason: str = ""
    """Why not."""


def _find(listing: Listing, wanted: Subnets) -> _Found:
    """The key with these subnets; of a dual-stack one either will do."""
    text = " ".join(map(str, wanted.values()))
    seen = snapshot(listing)
    found = []
    for entry in listing.entries:
        key = entry.key.removeprefix(SUBNETS_PREFIX)
        if key in seen.records or key in seen.bad:
            subnets = subnets_of(key)
            if all(subnets.get(family) == net for family, net in wanted.items()):
                record, reason = seen.records.get(key), seen.bad.get(key, "")
                found.append(_Found(key, entry.mod_revision, entry.etcd_lease, record, reason))
    if not found:
        raise RecordError(f"nobody holds {text}: see flannelctl leases")
    if len(found) > 1:
        keys = ", ".join(sorted(one.key for one in found))
        raise RecordError(f"{text} is in several records: give one of {keys}")
    return found[0]


def _require_not_ours(settings: Settings, found: _Found) -> None:
    """Raise FlanneldError if the daemon that runs here holds it.

    What somebody else has written in the place of our record is not ours.
    """
    status, silent = _status_of_the_prefix(settings)
    if status is None:
        if silent:
            raise FlanneldError(
                f"{found.key} may be this host's own, whose daemon runs and cannot be asked ({silent}): name "
                "its --subnet-file, or stop it"
            )
        return
    lease, record = status["lease"], found.record
    ours = bool(lease["key"] == found.key)
    if record is not None and record.node_id != status["node_id"]:
        ours = False
    elif lease["state"] == "conflict" and f"{found.etcd_lease:x}" != lease.get("etcd_lease"):
        ours = False  # a clone's, which has our node id
    if ours:
        raise FlanneldError(
            f"{found.key} is this host's own, and its daemon (pid {status['pid']}) runs"
            f"{', though it does not answer' if silent else ''}: stop that, then use --force, or flannelctl "
            "cleanup --release-lease"
        )


def _status_of_the_prefix(settings: Settings) -> tuple[Mapping[str, Any] | None, str]:
    """What the daemon of this prefix says; of one that runs in silence what it last wrote, and who it is."""
    try:
        status, silent = ask(settings.control_socket, "status"), ""
    except FlanneldError:
        status, silent = read_status_file(settings.status_file), holder_of(settings.prefix)
        if not silent:
            return None, ""
    if has_shape(status, SHAPE) and status["prefix"] == settings.prefix:
        return status, silent
    return None, holder_of(settings.prefix)


def _require_abandoned(registry: EtcdRegistry, found: _Found, listing: Listing) -> None:
    """Raise FlanneldError where its host may be alive."""
    if found.record is None:
        raise FlanneldError(
            f"{found.key} cannot be read, so it is not known who holds it: {found.reason}; "
            "--force deletes it all the same"
        )
    if found.etcd_lease:
        _require_silent(registry, found.record)
    elif not is_vacant(found.record, _published_type(listing)):
        raise FlanneldError(
            f"{found.key} is reserved for {owner_of(found.record)}, a host that has taken it, and a "
            "reservation does not show whether its host is alive: stop the daemon there, then use --force"
        )


def _published_type(listing: Listing) -> str:
    """What records of the network bear; empty also when that is not known."""
    entry = config_entry(listing)
    try:
        config = parse_config(entry.value) if entry is not None else None
    except ConfigError:
        config = None
    return "" if config is None or config.backend_type in ("udp", "alloc") else config.backend_type


def _require_silent(registry: EtcdRegistry, record: Record) -> None:
    """Of a host of flannel, which renews once a day, nothing is known before its lease ends."""
    left, granted, _ = registry.time_to_live(record.etcd_lease)
    wait = silent_in(left, granted) if record.node_id else left
    if left >= 0 and wait > 0:
        raise FlanneldError(
            f"{record.key} is held by {owner_of(record)}, who renewed it {duration(granted - left)} ago: "
            f"stop the daemon there; it counts as gone in {duration(wait)}, or use --force"
        )


def _revoke_unused(registry: EtcdRegistry, lease: int) -> None:
    """It would end by itself, but stand about until then."""
    if lease and not registry.time_to_live(lease, keys=True).keys:
        registry.revoke(lease)


def _warn_of_go(record: Record) -> None:
    if record.etcd_lease and not record.node_id:
        click.echo(
            "flannelctl: its record bears no node id: flannel will make it end again; run flanneld-py there "
            "instead, then reserve once more",
            err=True,
        )


def _too_busy() -> FlanneldError:
    return FlanneldError(
        "the records in etcd were changed each time just before ours; nothing was done, try again"
    )
