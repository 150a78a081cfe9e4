"""flannelctl cleanup: this host as if the daemon had never run, and nothing else touched.

The kernel is reconciled to the empty State by the daemon's own drivers. Then the files go, those that tell
what is ours last, so that a run that was cut short can be finished by the next.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct, field
from msgspec.structs import asdict

from flanneld_py.addresses import IPAddress, IPNetwork
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.text import echo_json, printable, utc
from flanneld_py.cli.ctl.traces import OwnFiles, Traces, find_traces
from flanneld_py.core.config import parse_config
from flanneld_py.core.describe import describe
from flanneld_py.core.duration import duration
from flanneld_py.core.plan import plan
from flanneld_py.core.records import SUBNETS_PREFIX, config_entry, format_key, snapshot
from flanneld_py.core.rules import names_of
from flanneld_py.errors import ConfigError, FlanneldError
from flanneld_py.model import HostFacts, Listing, Outcome, Record, Scope, State

if TYPE_CHECKING:
    from flanneld_py.daemon.execute import Executor
    from flanneld_py.drivers.packetrules import PacketRules

STOP_FIRST = "stop it first (systemctl stop flanneld-py)"
ANOTHER_DAEMONS = "stop that, or give the --subnet-file and --state-dir of the daemon to clean up after"
ROUNDS = 5
"""The kernel cascades, so read and plan again; what is there even then, somebody else keeps making."""


@click.command()
@click.option("--dry-run", is_flag=True, help="List the same lines, and change nothing.")
@click.option(
    "--release-lease/--keep-lease",
    "releases",
    default=False,
    help="Delete this host's record in etcd, too, so that its subnet is free at once.  [default: keep it]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="An object with the keys removed, failed, lease, notes."
)
@with_settings
def cleanup(settings: Settings, dry_run: bool, releases: bool, as_json: bool) -> int:
    """Remove from this host what flanneld-py made.

    That is devices, routes, packet-filter rules, subnet.env, and the daemon's own files; never what others
    made. Stop the daemon first, and run this before another flannel is started here. Unless it is released
    the lease stays in etcd until it ends. Exit 0: done, or nothing to remove; 1: something could not be
    removed, or the daemon runs.
    """
    # They cost what the other commands need not wait for.
    from flanneld_py.daemon.lock import Advice, Locks  # noqa: PLC0415
    from flanneld_py.daemon.run import require_net_admin  # noqa: PLC0415

    require_net_admin()
    journal = Journal(dry_run=dry_run, quiet=as_json)
    files = OwnFiles(settings)
    advice = Advice(prefix=STOP_FIRST, files=ANOTHER_DAEMONS)
    locks = Locks(settings.prefix, settings.state_dir, settings.subnet_file, advice)
    try:
        _clean(settings, files, journal, releases=releases)
    finally:
        files.remove_what_the_lock_made()
        locks.release()
    if as_json:
        echo_json(journal.to_json())
    else:
        _conclude(journal)
    return 1 if journal.failed else 0


class StandingLease(Struct, frozen=True):
    """The lease that this host leaves behind in etcd."""

    key: str
    ttl: int | None
    """Seconds left; None: a reservation, which never ends."""

    def describe(self, now: datetime) -> str:
        if self.ttl is None:
            return f"{self.key} stays in etcd; it is a reservation, which does not end"
        end = utc(now + timedelta(seconds=self.ttl))
        return f"{self.key} stays in etcd until {end} (for {duration(self.ttl)})"


class Journal(Struct):
    """What was removed, told as it happens, and what not."""

    dry_run: bool
    quiet: bool
    removed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lease: StandingLease | None = None

    def note_removed(self, line: str) -> None:
        self.removed.append(line)
        if not self.quiet:
            # A reader that leaves, such as `head`, is no reason to stop half-way.
            with suppress(BrokenPipeError):
                click.echo(printable(line))

    def to_json(self) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run,
            "removed": self.removed,
            "failed": [{"op": line, "error": error} for line, error in self.failed.items()],
            "lease": asdict(self.lease) if self.lease else None,
            "notes": self.notes,
        }


def _conclude(journal: Journal) -> None:
    if not journal.removed and not journal.failed:
        click.echo("nothing to remove")
    for note in journal.notes:
        click.echo(printable(note))
    for line, error in journal.failed.items():
        click.echo(f"flannelctl: {printable(line)}: {printable(error)}", err=True)
    if journal.failed:
        click.echo("flannelctl: the state files stay, for when this is run again", err=True)


def _clean(settings: Settings, files: OwnFiles, journal: Journal, *, releases: bool) -> None:
    traces = find_traces(settings)
    rules, executor = _drivers(settings.prefix)
    scope = Scope(settings.prefix, ())
    if traces.daemon_ran or executor.observe(scope) != State():
        registry = ask_registry(settings, traces.node_id, traces.lease_key)
        scope = scope_of(settings, traces, registry)
        _remove_objects(executor, scope, journal)
        journal.notes += rules.left_to_others()
        # Not before the routes are gone: another host may then have the subnet.
        if releases and not journal.failed:
            release_lease(settings, traces, registry, journal)
        else:
            journal.lease = registry.lease
            journal.notes += tell_lease(settings, traces, registry, datetime.now(UTC))
    if not journal.failed:
        _remove_files(files, traces.status is not None, [Path(path) for path in scope.files], journal)


# --- what is ours ---------------------------------------------------------------------------------


class Registry(Struct, frozen=True):
    """What etcd says."""

    obstacle: str = ""
    """Why it was not reached; the rest is empty then."""
    networks: tuple[IPNetwork, ...] = ()
    records: tuple[Record, ...] = ()
    own: Record | None = None
    lease: StandingLease | None = None
    """Of `own`, unless it is about to end."""


def ask_registry(settings: Settings, node_id: str, last_key: str = "") -> Registry:
    """Config, records and this host's lease. A host taken out of service may not reach etcd any more.

    `last_key`: what the last run held; of several records with the node id that is the one meant.
    """
    try:
        registry = settings.registry()
        # Small, so with a short deadline; a listing may take its time.
        registry.get("config")
        listing = registry.list()
        records = tuple(snapshot(listing).records.values())
        mine = [record for record in records if node_id and record.node_id == node_id]
        own = min(mine, key=lambda record: (record.key != last_key, record.create_revision), default=None)
        lease = None
        if own is not None:
            ttl = registry.time_to_live(own.etcd_lease).left if own.etcd_lease else None
            if ttl is None or ttl >= 0:
                lease = StandingLease(_whole_key(settings, own.key), ttl)
    except FlanneldError as error:
        return Registry(obstacle=str(error))
    return Registry(networks=_config_networks(listing), records=records, own=own, lease=lease)


def _config_networks(listing: Listing) -> tuple[IPNetwork, ...]:
    entry = config_entry(listing)
    try:
        return parse_config(entry.value).networks if entry else ()
    except ConfigError:
        return ()


def scope_of(settings: Settings, traces: Traces, registry: Registry) -> Scope:
    """What the drivers may take for ours."""
    if not traces.daemon_ran:
        return Scope(settings.prefix, ())
    adoptable: dict[IPNetwork, frozenset[IPAddress]] = {}
    for record in registry.records:
        for family, subnet in record.subnets.items():
            public = record.public_ips.get(family)
            adoptable[subnet] = frozenset(ip for ip in (subnet.network_address, public) if ip is not None)
    networks = tuple(dict.fromkeys((*traces.networks, *registry.networks)))
    files = frozenset((str(settings.subnet_file),) if traces.subnet_env else ())
    return Scope(settings.prefix, networks, adoptable, files=files)


def tell_lease(settings: Settings, traces: Traces, registry: Registry, now: datetime) -> list[str]:
    """What becomes of the lease, which is not touched."""
    if registry.lease is not None:
        return [registry.lease.describe(now)]
    if not registry.obstacle:
        return []
    subnets = traces.saved.subnets if traces.saved else None
    lease = (
        f"{_whole_key(settings, format_key(subnets))} stays there"
        if subnets and subnets.values()
        else "a lease of this host stays there"
    )
    return [f"etcd could not be asked ({registry.obstacle}); {lease} until it ends by itself"]


def release_lease(settings: Settings, traces: Traces, registry: Registry, journal: Journal) -> None:
    """Delete this host's record, if it is as it was read, and end its etcd lease unless it has other keys."""
    own = registry.own
    if registry.obstacle:
        journal.failed["release the lease"] = f"etcd could not be asked ({registry.obstacle})"
    if own is None:
        return
    line = f"del lease {_whole_key(settings, own.key)}"
    if not is_of_this_host(own, traces, _host_facts()):
        addresses = " and ".join(map(str, own.public_ips.values()))
        journal.failed[line] = (
            f"it is the lease of {addresses}, no address of this host, which may be a clone; if that host is "
            f"gone: flannelctl leases release {own.key}; else repeat this with --keep-lease"
        )
        return
    try:
        if not journal.dry_run:
            client = settings.registry()
            if not client.delete(f"{SUBNETS_PREFIX}{own.key}", own.mod_revision).ok:
                journal.failed[line] = "it was changed meanwhile; run this again"
                return
            if own.etcd_lease and not client.time_to_live(own.etcd_lease, keys=True).keys:
                client.revoke(own.etcd_lease)
    except FlanneldError as error:
        journal.failed[line] = str(error)
        return
    journal.note_removed(line)


def is_of_this_host(own: Record, traces: Traces, facts: HostFacts) -> bool:
    """Whether a record with our node id is ours and not that of a machine this one was cloned from."""
    addresses = {held.address.ip for link in facts.links for held in link.addresses}
    if any(ip in addresses for ip in own.public_ips.values()):
        return True
    saved = traces.saved
    same_machine = saved is not None and saved.mac in {link.mac for link in facts.links}
    return same_machine and (own.key, own.etcd_lease) == (traces.lease_key, saved.etcd_lease if saved else 0)


def _host_facts() -> HostFacts:
    from flanneld_py.drivers.kernel import read_host  # noqa: PLC0415

    return read_host()


def _whole_key(settings: Settings, key: str) -> str:
    return f"{settings.prefix.rstrip('/')}/{SUBNETS_PREFIX}{key}"


# --- removal --------------------------------------------------------------------------------------


def _drivers(prefix: str) -> tuple[PacketRules, Executor]:
    """All drivers as one, as the daemon puts them together, and that of the rules."""
    from flanneld_py.daemon.execute import Executor  # noqa: PLC0415
    from flanneld_py.drivers.blackholes import Blackholes  # noqa: PLC0415
    from flanneld_py.drivers.files import HostFiles  # noqa: PLC0415
    from flanneld_py.drivers.filtertools import find_tools  # noqa: PLC0415
    from flanneld_py.drivers.kernel import KernelLinks  # noqa: PLC0415
    from flanneld_py.drivers.packetrules import PacketRules  # noqa: PLC0415
    from flanneld_py.drivers.rtnetlink import RtnetlinkTables  # noqa: PLC0415

    rules = PacketRules(names_of(prefix), find_tools())
    others = KernelLinks(prefix), RtnetlinkTables(prefix), Blackholes(prefix), HostFiles()
    return rules, Executor((*others, rules))


def _remove_objects(executor: Executor, scope: Scope, journal: Journal) -> None:
    """Reconcile to the empty State."""
    for _ in range(ROUNDS):
        have = executor.observe(scope)
        ops = plan(State(), have)
        outcomes = [Outcome(op) for op in ops] if journal.dry_run else executor.apply(ops, State(), have)
        journal.failed = {describe(op): error for op, error in outcomes if error is not None}
        for op, error in outcomes:
            if error is None:
                journal.note_removed(describe(op))
        if journal.dry_run or len(journal.failed) == len(outcomes):
            return
    for op in plan(State(), executor.observe(scope)):
        journal.failed.setdefault(describe(op), "was made again by somebody; stop that first")


def _remove_files(files: OwnFiles, status_is_ours: bool, gone: list[Path], journal: Journal) -> None:
    """`gone`: what went with the objects, or would have."""
    own = files.files(status_is_ours=status_is_ours)
    gone = [*gone, *(path for path in own if _removed(path, "file", journal))]
    for path in files.directories(gone):
        _removed(path, "directory", journal)


def _removed(path: Path, noun: str, journal: Journal) -> bool:
    line = f"del {noun} {path}"
    try:
        if not journal.dry_run:
            path.rmdir() if noun == "directory" else path.unlink(missing_ok=True)
    except OSError as error:
        if noun == "directory" and error.errno in (errno.ENOTEMPTY, errno.EBUSY):
            return False  # in use by somebody else: another file, or a mount
        journal.failed[line] = error.strerror or str(error)
        return False
    journal.note_removed(line)
    return True
