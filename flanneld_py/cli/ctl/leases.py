"""flannelctl leases: who holds which subnet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from flanneld_py.cli.ctl.control import read_status_file
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.text import count, duration, echo_json, table
from flanneld_py.core.records import snapshot
from flanneld_py.model import PerFamily, Record, Snapshot

HEADERS = ("", "SUBNET", "PUBLIC IP", "BACKEND", "VTEP MAC", "NODE")
Row = tuple[str, ...]
Lifetimes = Mapping[str, int | None]
"""Key → seconds left; None: for ever."""


@click.command()
@click.option("--ttl", "with_ttl", is_flag=True, help="Ask for the time left too: one request per lease.")
@click.option("--json", "as_json", is_flag=True, help="An object with the keys leases and bad.")
@with_settings
def leases(settings: Settings, with_ttl: bool, as_json: bool) -> int:
    """Who holds which subnet, read from etcd.

    This host's own lease is marked with *. Exit 0; 1 if a record cannot be used; 75 if etcd is not reached.
    """
    registry = settings.registry()
    listing = registry.list()
    seen = snapshot(listing)
    lifetimes = (
        {
            key: registry.time_to_live(record.etcd_lease) if record.etcd_lease else None
            for key, record in seen.records.items()
        }
        if with_ttl
        else None
    )
    own = own_node_id(settings)
    if as_json:
        echo_json(to_json(seen, own, lifetimes))
    else:
        click.echo(render(seen, own, lifetimes, settings.prefix))
    return 1 if seen.bad else 0


def own_node_id(settings: Settings) -> str:
    """As the daemon of this host last told; empty when none did, for this prefix."""
    status = read_status_file(settings.status_file) or {}
    return str(status.get("node_id") or "") if status.get("prefix") == settings.prefix else ""


def render(seen: Snapshot, own: str, lifetimes: Lifetimes | None, prefix: str) -> str:
    """A table of the records by subnet, one of the bad ones with their reason, and a line of totals."""
    rows = [_row(record, own, lifetimes) for record in sorted(seen.records.values(), key=_by_subnet)]
    headers = HEADERS if lifetimes is None else (*HEADERS, "TIME LEFT")
    bad = [("!", key, reason) for key, reason in sorted(seen.bad.items())]
    if not rows and not bad:
        return f"no leases below {prefix}/subnets at revision {seen.revision}"
    parts = [table(rows, headers)] if rows else []
    if bad:
        # A table of their own: the reasons are sentences.
        parts.append(table(bad, ("", "BAD RECORD", "REASON")))
    totals = count(len(rows), "lease") + (f", {count(len(bad), 'bad record')}" if bad else "")
    return "\n\n".join((*parts, f"{totals} at revision {seen.revision}"))


def to_json(seen: Snapshot, own: str, lifetimes: Lifetimes | None) -> dict[str, Any]:
    """The same for programs; `ttl` in seconds (-1: has just ended, null: for ever) only when asked for."""
    return {
        "revision": seen.revision,
        "leases": [
            {
                "key": record.key,
                "subnets": [str(subnet) for subnet in record.subnets.values()],
                "public_ips": [str(ip) for ip in record.public_ips.values()],
                "backend": record.backend_type,
                "vtep_macs": list(record.vtep_macs.values()),
                "node_id": record.node_id,
                "etcd_lease": f"{record.etcd_lease:x}",
                "own": bool(own) and record.node_id == own,
                **({} if lifetimes is None else {"ttl": lifetimes[record.key]}),
            }
            for record in sorted(seen.records.values(), key=_by_subnet)
        ],
        "bad": dict(sorted(seen.bad.items())),
    }


def _row(record: Record, own: str, lifetimes: Lifetimes | None) -> Row:
    row = (
        "*" if own and record.node_id == own else "",
        _joined(record.subnets),
        _joined(record.public_ips),
        record.backend_type or "udp or alloc",
        _joined(record.vtep_macs),
        record.node_id or "-",
    )
    return row if lifetimes is None else (*row, _time_left(lifetimes[record.key]))


def _joined(values: PerFamily[Any]) -> str:
    return " ".join(map(str, values.values())) or "-"


def _time_left(seconds: int | None) -> str:
    if seconds is None:
        return "for ever"
    return duration(seconds) if seconds >= 0 else "ended"


def _by_subnet(record: Record) -> tuple[tuple[int, int, int], ...]:
    return tuple((net.version, int(net.network_address), net.prefixlen) for net in record.subnets.values())
