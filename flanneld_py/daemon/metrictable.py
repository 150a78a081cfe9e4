"""What /metrics has: one table, of which the page, its documentation and its tests are made."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from msgspec import Struct, field

from flanneld_py import __version__
from flanneld_py.core.freesubnets import count_free
from flanneld_py.daemon.checks import Check, is_ready
from flanneld_py.daemon.counts import Counts, Durations, Labels
from flanneld_py.daemon.inbox import Levels
from flanneld_py.daemon.status import WAYS
from flanneld_py.drivers.counters import LinkCounters
from flanneld_py.model import Table
from flanneld_py.udp.pycounts import ONE_WAY

PREFIX = "flanneld_"
TABLES: tuple[Table, ...] = get_args(Table)
LEASE_STATES = ("none", "waiting", "held", "conflict", "lost")
Values: TypeAlias = Mapping[Labels, float]


class Scrape(Struct, frozen=True):
    """Everything that is known at the moment of asking."""

    levels: Levels
    counts: Counts
    live: tuple[Check, ...]
    ready: tuple[Check, ...]
    boottime: float
    unix_time: float
    udp_checksum_errors: int | None
    tunnels: tuple[LinkCounters, ...]
    """Of our own devices; host-gw has none."""
    traffic: Mapping[str, int] = field(default_factory=dict)
    """What the data plane has counted, by the names of udp/pump.h; empty where it is the kernel's."""


class Metric(Struct, frozen=True):
    """One metric. Without a value for some labels it has no line for them."""

    name: str
    """Without PREFIX; a counter's ends in `_total`."""
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    read: Callable[[Scrape], Values | Mapping[Labels, Durations]]
    labels: tuple[str, ...] = ()


def _one(value: float | None) -> Values:
    return {} if value is None else {(): float(value)}


def _each(names: Iterable[str], values: Mapping[str, float]) -> Values:
    """A line for each name, 0 where there is no value: a line that appears later shows no increase."""
    return {(name,): float(values.get(name, 0)) for name in names}


def _counted(names: Iterable[str], values: Mapping[Labels, int]) -> Values:
    return _each(names, {name: count for (name,), count in values.items()})


def _build(now: Scrape) -> Values:
    network = now.levels.network
    return {(__version__, platform.python_version(), network.backend.type if network else ""): 1}


def _reporters(now: Scrape) -> Values:
    return {
        (check.name, kind): float(check.ok)
        for kind, checks in (("live", now.live), ("ready", now.ready))
        for check in checks
    }


def _lease_end(now: Scrape) -> Values:
    ends = now.levels.lease.ends
    return _one(None if ends is None else now.unix_time + ends - now.boottime)


def _bad_records(now: Scrape) -> Values:
    snapshot = now.levels.snapshot
    return _one(None if snapshot is None else len(snapshot.bad))


def _subnets(now: Scrape) -> Values:
    network, snapshot = now.levels.network, now.levels.snapshot
    if network is None or snapshot is None:
        return {}
    records = snapshot.records.values()
    taken = [net for record in records for net in record.subnets.values()]
    reserved = sum(not record.etcd_lease for record in records)
    return {
        ("free",): min(count_free(allowed, taken) for allowed in network.config.ranges.values()),
        ("leased",): len(records) - reserved,
        ("reserved",): reserved,
    }


def _config(code: str) -> Callable[[Scrape], Values]:
    def read(now: Scrape) -> Values:
        problem = now.levels.config_problem
        return _one(problem is not None and problem.code == code)

    return read


def _peers(now: Scrape) -> Values:
    report = now.levels.report
    return {
        ("accepted",): len(report.peers.accepted) - report.held,
        ("held",): report.held,
        ("rejected",): len(report.peers.rejected),
    }


def _mtu(now: Scrape) -> Values:
    host, mtu = now.levels.host, now.levels.report.mtu
    underlay: Values = {("underlay",): host.external.mtu} if host else {}
    return {**underlay, **({("overlay",): mtu} if mtu is not None else {})}


def _tunnels(name: Literal["packets", "bytes", "drops"]) -> Callable[[Scrape], Values]:
    def read(now: Scrape) -> Values:
        if not now.tunnels:
            return {}
        received = sum(getattr(link.received, name) for link in now.tunnels)
        return {("rx",): received, ("tx",): sum(getattr(link.sent, name) for link in now.tunnels)}

    return read


def _udp(name: str) -> Callable[[Scrape], Values]:
    """A counter of each direction."""

    def read(now: Scrape) -> Values:
        if not now.traffic:
            return {}
        return {(label,): now.traffic.get(f"{way}.{name}", 0) for way, label in WAYS.items()}

    return read


def _udp_drops(now: Scrape) -> Values:
    found: dict[Labels, float] = {}
    for name, number in now.traffic.items():
        way, _, reason = name.partition(".drop.")
        if reason and not any(reason in only for other, only in ONE_WAY.items() if other != way):
            found[WAYS[way], reason] = number
    return found


def _udp_info(now: Scrape) -> Values:
    plane = now.levels.data_plane
    return {(plane.runs,): 1} if plane is not None and plane.runs else {}


METRICS: tuple[Metric, ...] = (
    Metric("build_info", "gauge", "1; what runs here.", _build, ("version", "python", "backend")),
    Metric("ready", "gauge", "1 when /readyz answers 200.", lambda now: _one(is_ready(now.ready))),
    Metric(
        "health_reporter",
        "gauge",
        "1 while this check of /healthz (live) or /readyz (ready) is well.",
        _reporters,
        ("name", "kind"),
    ),
    Metric(
        "lease_state",
        "gauge",
        "1 for the state that our lease is in.",
        lambda now: _each(LEASE_STATES, {now.levels.lease.state: 1}),
        ("state",),
    ),
    Metric(
        "lease_expiry_timestamp_seconds",
        "gauge",
        "When our lease ends unless it is renewed; none for a reservation.",
        _lease_end,
    ),
    Metric(
        "lease_renewals_total",
        "counter",
        "Attempts to renew our lease; expired: it was too late.",
        lambda now: _counted(("ok", "failed", "expired"), now.counts.counted("lease_renewals")),
        ("result",),
    ),
    Metric(
        "lease_conflicts_total",
        "counter",
        "How often another host was found where our lease should be.",
        lambda now: _one(now.counts.counted("lease_conflicts").get((), 0)),
    ),
    Metric(
        "registry_up",
        "gauge",
        "1 while etcd is reached and what it says is followed.",
        lambda now: _one(now.levels.registry.state == "in sync"),
    ),
    Metric(
        "registry_last_sync_timestamp_seconds",
        "gauge",
        "When etcd last sent something; a quiet one is asked for a sign of life every few seconds, by many "
        "hosts less often.",
        lambda now: _one(now.counts.last_sync),
    ),
    Metric(
        "registry_recalled_timestamp_seconds",
        "gauge",
        "Of when the state of an earlier run is that is gone by, while etcd has not answered this one.",
        lambda now: _one(now.levels.recalled.time if now.levels.recalled else None),
    ),
    Metric(
        "registry_revision",
        "gauge",
        "Revision of etcd of the last change to the leases.",
        lambda now: _one(now.levels.snapshot.revision if now.levels.snapshot else None),
    ),
    Metric(
        "registry_resyncs_total",
        "counter",
        "Listings of the whole registry, by why.",
        lambda now: _counted(
            ("start", "timer", "compacted", "replaced", "distrust"), now.counts.counted("registry_resyncs")
        ),
        ("reason",),
    ),
    Metric("registry_bad_records", "gauge", "Records that cannot be read and are left out.", _bad_records),
    Metric(
        "registry_request_duration_seconds",
        "histogram",
        "Calls to etcd, retries at other endpoints included, whether or not they succeeded.",
        lambda now: now.counts.timed("registry_request"),
        ("op",),
    ),
    Metric(
        "events_total",
        "counter",
        "Changes that the watch delivered.",
        lambda now: _counted(("put", "delete"), now.counts.counted("events")),
        ("type",),
    ),
    Metric("subnets", "gauge", "Subnets of the network; free: of the scarcer family.", _subnets, ("state",)),
    Metric(
        "config_rejected",
        "gauge",
        "1 while the stored network config is invalid; that before it stays in force.",
        _config("config-invalid"),
    ),
    Metric(
        "config_pending",
        "gauge",
        "1 while the stored network config waits for flannelctl config apply or a restart.",
        _config("config-pending"),
    ),
    Metric(
        "peers",
        "gauge",
        "Other hosts; held: their records vanished, rejected: left out because they would harm others.",
        _peers,
        ("state",),
    ),
    Metric(
        "reconcile_duration_seconds",
        "histogram",
        "Passes that compared the kernel with what it should be, and mended it.",
        lambda now: {(): Durations(), **now.counts.timed("reconcile")},
    ),
    Metric(
        "reconcile_failures_total",
        "counter",
        "Attempts to set or delete a row that failed; all: passes that failed as a whole.",
        lambda now: _counted((*TABLES, "all"), now.counts.counted("reconcile_failures")),
        ("object",),
    ),
    Metric(
        "drift_repaired_total",
        "counter",
        "Rows put right that somebody else had changed.",
        lambda now: _each(TABLES, now.levels.report.repaired),
        ("object",),
    ),
    Metric(
        "drift_current",
        "gauge",
        "Rows that are not as they should be and could not be put right yet.",
        lambda now: _each(TABLES, now.levels.report.failing),
        ("object",),
    ),
    Metric(
        "kernel_objects",
        "gauge",
        "Rows of ours, as last read back.",
        lambda now: _each(TABLES, now.levels.report.rows),
        ("object",),
    ),
    Metric("mtu_bytes", "gauge", "MTU of the overlay and of the interface below it.", _mtu, ("scope",)),
    Metric(
        "udp_csum_errors_total",
        "counter",
        "Packets that the kernel dropped for a wrong UDP checksum, of all programs.",
        lambda now: _one(now.udp_checksum_errors),
    ),
    Metric(
        "tunnel_packets_total",
        "counter",
        "Packets through our own devices.",
        _tunnels("packets"),
        ("direction",),
    ),
    Metric(
        "tunnel_bytes_total", "counter", "Bytes through our own devices.", _tunnels("bytes"), ("direction",)
    ),
    Metric(
        "tunnel_drops_total",
        "counter",
        "Packets dropped by our own devices.",
        _tunnels("drops"),
        ("direction",),
    ),
    Metric("udp_info", "gauge", "1; what forwards the packets: native or python.", _udp_info, ("plane",)),
    Metric(
        "udp_packets_total",
        "counter",
        "Packets that backend udp sent to peers and received from them.",
        _udp("packets"),
        ("direction",),
    ),
    Metric("udp_bytes_total", "counter", "Bytes of these packets.", _udp("bytes"), ("direction",)),
    Metric(
        "udp_drops_total",
        "counter",
        "Packets that backend udp dropped, by why.",
        _udp_drops,
        ("direction", "reason"),
    ),
    Metric(
        "udp_fallbacks_total",
        "counter",
        "Batches that were sent again without an offload, as kernel or device refused it.",
        _udp("offload-refused"),
        ("direction",),
    ),
    Metric(
        "udp_restarts_total",
        "counter",
        "How often the process that forwards packets was started again.",
        lambda now: _one(now.levels.data_plane.restarts if now.levels.data_plane else None),
    ),
)
"""In the order of the page. None is by peer: ten thousand hosts with a line for each of the others are a
hundred million lines."""
