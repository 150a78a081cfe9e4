"""flannelctl leases: who holds which subnet."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import click
from msgspec import Struct, field

from flanneld_py.addresses import FAMILIES, PerFamily, Subnets
from flanneld_py.cli.ctl.control import ask, read_status_file
from flanneld_py.cli.ctl.progress import waiting_for
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.shape import has_shape
from flanneld_py.cli.ctl.text import count, echo_json, printable, table
from flanneld_py.core.admit import admit
from flanneld_py.core.config import parse_config
from flanneld_py.core.duration import duration
from flanneld_py.core.records import SUBNETS_PREFIX, config_entry, parse_key, snapshot
from flanneld_py.errors import ConfigError, FlanneldError, RecordError
from flanneld_py.model import Listing, NetworkConfig, Record

UNTYPED = ("udp", "alloc")
"""Backends whose records name no type, as flannel's."""
HEADERS = ("SUBNET", "PUBLIC IP", "BACKEND", "NODE", "OWNER", "TIME LEFT", "STATE")
MOST_UNASKED = 500
"""Etcd leases whose time left is asked for unless it is forbidden: each is a request."""
LONGEST_NODE = 12
INDENT = "    "
Lifetimes = Mapping[int, int]
"""Etcd lease → seconds left, -1: has just ended."""
Owner = Literal["this host", "flanneld-py", "flannel", "reserved", ""]
SHAPE: dict[str, Any] = {
    "prefix": (str,),
    "node_id": (str,),
    "judged": (bool,),
    "rejected": {},
    "doubtful": {},
}
"""What the daemon answers to `peers`."""


class Verdict(Struct, frozen=True):
    """What is made of the readable records."""

    by: Literal["daemon", "config", "nobody"] = "nobody"
    """The daemon of this host; the network config alone; or nobody, for want of a valid config."""
    own: str = ""
    """This host's node id, if known."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Key → why it is no peer."""
    doubtful: Mapping[str, str] = field(default_factory=dict)


class Row(Struct, frozen=True):
    """One key below `subnets/`."""

    key: str
    subnets: Subnets
    """Empty if the key names none."""
    etcd_lease: int
    record: Record | None
    """None if it cannot be read."""
    owner: Owner
    reason: str = ""
    """Why it is bad."""
    doubt: str = ""
    untyped: str = ""
    """Its backend, if it names none."""

    @property
    def state(self) -> str:
        return f"bad: {self.reason}" if self.reason else f"ok, but {self.doubt}" if self.doubt else "ok"


@click.group(invoke_without_command=True)
@click.option(
    "--ttl/--no-ttl",
    "with_ttl",
    default=None,
    help=f"The time left too, one request per lease.  [default: up to {MOST_UNASKED} leases]",
)
@click.option("--json", "as_json", is_flag=True, help="An object with the keys leases and bad.")
@with_settings
def leases(settings: Settings, with_ttl: bool | None, as_json: bool) -> int:
    """Who holds which subnet, read from etcd.

    Of bad records, which are no peers, the reason is told; those that are bad for this host only are known
    while its daemon runs. Exit 0; 1 if a record is bad; 75 if etcd is not reached.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return 0
    registry = settings.registry()
    with waiting_for(f"etcd {', '.join(settings.endpoints)}"):
        listing = registry.list()
        asked = {entry.etcd_lease for entry in listing.entries if entry.etcd_lease}
        if with_ttl is None:
            with_ttl = len(asked) <= MOST_UNASKED
        lifetimes = {lease: registry.time_to_live(lease).left for lease in asked} if with_ttl else None
    verdict = find_verdict(settings, listing)
    rows = find_rows(listing, verdict)
    if as_json:
        echo_json(to_json(listing.revision, rows, verdict, lifetimes))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        click.echo(render(listing.revision, rows, verdict, lifetimes, settings.prefix, width))
    return 1 if any(row.reason for row in rows) else 0


# --- what is made of the records ------------------------------------------------------------------


def find_verdict(settings: Settings, listing: Listing) -> Verdict:
    """That of this host's daemon, who alone knows what would harm this host; else that of the config."""
    with suppress(FlanneldError):
        told = ask(settings.control_socket, "peers")
        if has_shape(told, SHAPE) and told["prefix"] == settings.prefix and told["judged"]:
            return Verdict("daemon", told["node_id"], told["rejected"], told["doubtful"])
    return judge(listing, own_node_id(settings))


def judge(listing: Listing, own: str) -> Verdict:
    """By the config in etcd, as a host would that has no lease and no networks of its own."""
    config = _stored_config(listing)
    if config is None:
        return Verdict(own=own)
    published = "" if config.backend_type in UNTYPED else config.backend_type
    peers = admit(snapshot(listing), None, config, None, published)
    return Verdict("config", own, peers.rejected, peers.doubtful)


def _stored_config(listing: Listing) -> NetworkConfig | None:
    """None: there is none, or it is wrong."""
    entry = config_entry(listing)
    try:
        return parse_config(entry.value) if entry is not None else None
    except ConfigError:
        return None


def own_node_id(settings: Settings) -> str:
    """As the daemon of this host last told; empty when none did, for this prefix."""
    status = read_status_file(settings.status_file) or {}
    return str(status.get("node_id") or "") if status.get("prefix") == settings.prefix else ""


def find_rows(listing: Listing, verdict: Verdict) -> list[Row]:
    """A row for each key, by address; those that name none come last."""
    seen, config = snapshot(listing), _stored_config(listing)
    untyped = config.backend_type if config is not None and config.backend_type in UNTYPED else ""
    rows = []
    for entry in listing.entries:
        if not entry.key.startswith(SUBNETS_PREFIX):
            continue
        key = entry.key.removeprefix(SUBNETS_PREFIX)
        record = seen.records.get(key)
        owner: Owner = _owner(record, verdict.own) if record else ""
        rows.append(
            Row(
                key=key,
                subnets=record.subnets if record else subnets_of(key),
                etcd_lease=entry.etcd_lease,
                record=record,
                owner=owner,
                reason=seen.bad.get(key) or verdict.rejected.get(key, ""),
                doubt=verdict.doubtful.get(key, ""),
                untyped="" if owner in ("", "reserved") else untyped,
            )
        )
    return sorted(rows, key=_by_address)


def subnets_of(key: str) -> Subnets:
    """Those that a key names, or none."""
    with suppress(RecordError):
        return parse_key(key)
    return PerFamily()


def _owner(record: Record, own: str) -> Owner:
    if own and record.node_id == own:
        return "this host"
    if record.node_id:
        return "flanneld-py"
    return "flannel" if record.etcd_lease else "reserved"


def _by_address(row: Row) -> tuple[object, ...]:
    nets = [(net.version, int(net.network_address), net.prefixlen) for net in row.subnets.values()]
    return not nets, nets, row.key


# --- the views ------------------------------------------------------------------------------------


def render(
    revision: int,
    rows: Sequence[Row],
    verdict: Verdict,
    lifetimes: Lifetimes | None,
    prefix: str,
    width: int | None = None,
) -> str:
    """A table and a line of totals; on a terminal of `width` columns long reasons get lines of their own."""
    if not rows:
        return f"no leases below {prefix}/subnets at revision {revision}"
    lines = _table(rows, lifetimes, width)
    bad, doubtful = sum(bool(row.reason) for row in rows), sum(bool(row.doubt) for row in rows)
    totals = [count(len(rows) - bad, "lease")]
    totals += [count(bad, "bad record")] if bad else []
    totals += [f"{doubtful} doubtful"] if doubtful else []
    lines += ["", f"{', '.join(totals)} at revision {revision}"]
    if verdict.by != "daemon":
        known = "the network config only" if verdict.by == "config" else "nothing: there is no valid config"
        lines.append(f"no daemon answers on this host, so they were checked against {known}")
    return "\n".join(lines)


def _table(rows: Sequence[Row], lifetimes: Lifetimes | None, width: int | None) -> list[str]:
    cells = [list(_cells(row, lifetimes)) for row in rows]
    whole = table([line for lines in cells for line in lines], HEADERS).splitlines()
    if width is None or all(len(line) <= width for line in whole):
        return whole
    short = [[(*first[:-1], first[-1].partition(" ")[0].rstrip(":,")), *more] for first, *more in cells]
    header, *body = table([line for lines in short for line in lines], HEADERS).splitlines()
    lines = [header]
    for row, own in zip(rows, short, strict=True):
        lines += body[: len(own)]
        body = body[len(own) :]
        text = printable(row.reason or row.doubt)
        lines += textwrap.wrap(text, max(width, 40), initial_indent=INDENT, subsequent_indent=INDENT)
    return lines


def _cells(row: Row, lifetimes: Lifetimes | None) -> Iterator[tuple[str, ...]]:
    """A line of the table, and a second one for the addresses of the other family."""
    record, node = row.record, row.record.node_id if row.record else ""
    subnets = _texts(row.subnets)
    publics = _texts(record.public_ips) if record else []
    yield (
        subnets[0] if subnets else row.key or '""',
        publics[0] if publics else "-",
        (record.backend_type if record else "") or row.untyped or "-",
        (node if len(node) <= LONGEST_NODE else f"{node[:8]}…") or "-",
        row.owner or "-",
        _time_left(row, lifetimes),
        row.state,
    )
    if len(subnets) > 1:
        yield (subnets[1], publics[1] if len(publics) > 1 else "", "", "", "", "", "")


def to_json(
    revision: int, rows: Iterable[Row], verdict: Verdict, lifetimes: Lifetimes | None
) -> dict[str, Any]:
    """The same for programs; `ttl` in seconds (-1: has just ended, null: for ever) only if asked for."""
    return {
        "revision": revision,
        "checked_by": verdict.by,
        "leases": [_to_json(row, lifetimes) for row in rows],
        "bad": {row.key: row.reason for row in rows if row.reason},
    }


def _to_json(row: Row, lifetimes: Lifetimes | None) -> dict[str, Any]:
    record = row.record
    ttl = {} if lifetimes is None else {"ttl": lifetimes[row.etcd_lease] if row.etcd_lease else None}
    return {
        "key": row.key,
        "subnets": _texts(row.subnets),
        "public_ips": _texts(record.public_ips) if record else [],
        "backend": record.backend_type if record else None,
        "vtep_macs": _texts(record.vtep_macs) if record else [],
        "node_id": record.node_id if record else "",
        "etcd_lease": f"{row.etcd_lease:x}",
        "owner": row.owner or None,
        "own": row.owner == "this host",
        **ttl,
        "state": "bad" if row.reason else "ok",
        "reason": row.reason or row.doubt or None,
    }


def _texts(values: PerFamily[Any]) -> list[str]:
    return [str(value) for family in FAMILIES if (value := values.get(family)) is not None]


def _time_left(row: Row, lifetimes: Lifetimes | None) -> str:
    if not row.etcd_lease:
        return "for ever"
    if lifetimes is None:
        return "-"
    seconds = lifetimes[row.etcd_lease]
    return duration(seconds) if seconds >= 0 else "ended"
