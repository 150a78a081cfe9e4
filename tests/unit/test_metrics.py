"""/metrics: names that stay, values that are true, a page that Prometheus' own parser takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from flanneld_py import __version__
from flanneld_py.addresses import PerFamily
from flanneld_py.core.admit import Peers
from flanneld_py.daemon.counts import BOUNDS, Counts
from flanneld_py.daemon.inbox import Inbox, LeaseState, Levels, RegistryState, boottime
from flanneld_py.daemon.metrics import metrics_page
from flanneld_py.daemon.metrictable import METRICS, PREFIX
from flanneld_py.daemon.status import Process
from flanneld_py.model import Snapshot
from tests.unit.strategies import subnet
from tests.unit.test_status import OWN, PEER, WELL

GOLDEN = Path(__file__).with_name("metrics.golden")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def inbox_with(levels: Levels) -> Inbox:
    inbox = Inbox()
    known = set(Levels.__struct_fields__) - {"kernel_changes"}
    inbox.offer(**{name: getattr(levels, name) for name in known})
    return inbox


def scrape(inbox: Inbox, accept: str = "", hanging: tuple[str, ...] = ()) -> str:
    page = metrics_page(inbox, Process(os.getpid(), "/p", "node", lambda: hanging), lambda: None)
    status, body, content_type = page(accept)
    assert status == HTTPStatus.OK
    assert content_type.startswith("application/openmetrics-text" if accept else "text/plain; version=")
    return body.decode()


def values(inbox: Inbox, hanging: tuple[str, ...] = ()) -> dict[str, float]:
    """`name{label="value"}` → value, of our own metrics."""
    return {
        row(sample): sample.value
        for family in parse_text(scrape(inbox, hanging=hanging))
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


def row(sample: Sample) -> str:
    name = sample.name.removeprefix(PREFIX)
    labels = ",".join(f'{label}="{value}"' for label, value in sorted(sample.labels.items()))
    return f"{name}{{{labels}}}" if labels else name


# --- the table ------------------------------------------------------------------------------------


def headings(text: str) -> Iterator[str]:
    wanted = (f"# HELP {PREFIX}", f"# TYPE {PREFIX}")
    yield from (line for line in text.splitlines() if line.startswith(wanted))


def test_names_types_and_help_are_what_dashboards_were_made_for() -> None:
    found = [*headings(scrape(inbox_with(WELL)))]
    assert found == GOLDEN.read_text().splitlines(), "a change here breaks alerts: add, do not rename"


def test_the_same_metrics_are_there_before_anything_is_known() -> None:
    assert [*headings(scrape(Inbox()))] == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_the_page_is_what_prometheus_reads(accept: str) -> None:
    inbox = inbox_with(WELL)
    inbox.counts.took("registry_request", 0.02, "Range")
    text = scrape(inbox, accept)
    families = list(parse_openmetrics(text) if accept else parse_text(text))  # type: ignore[no-untyped-call]
    found = {family.name: family.type for family in families}
    for metric in METRICS:
        name = (PREFIX + metric.name).removesuffix("_total")
        assert found[name] == metric.kind
    assert {"process_cpu_seconds", "process_resident_memory_bytes"} <= found.keys()


def test_names_are_by_the_conventions() -> None:
    for metric in METRICS:
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert (metric.kind == "histogram") <= metric.name.endswith("_seconds")
        assert metric.meaning.endswith(".")
        assert not {"peer", "subnet", "ip", "address", "node"} & set(metric.labels)


def test_ten_thousand_peers_are_no_more_lines() -> None:
    peers = tuple(replace(PEER, key=f"10.{n >> 8}.{n & 255}.0-24") for n in range(10_000))
    many = replace(WELL, report=replace(WELL.report, peers=Peers(peers, {})))
    assert len(values(inbox_with(many))) == len(values(inbox_with(WELL)))
    assert values(inbox_with(many))['peers{state="accepted"}'] == 10_000


# --- values ---------------------------------------------------------------------------------------


def test_when_all_is_well() -> None:
    reserved = replace(PEER, subnets=PerFamily(subnet(4, 2)), etcd_lease=0)
    snapshot = replace(WELL.snapshot, records={OWN.key: OWN, PEER.key: reserved}) if WELL.snapshot else None
    lease = replace(WELL.lease, ends=boottime() + 3600)
    inbox = inbox_with(replace(WELL, lease=lease, snapshot=snapshot))
    inbox.counts.synced()
    found = values(inbox)
    (build,) = (name for name in found if name.startswith("build_info"))
    assert f'version="{__version__}"' in build
    assert 'backend="vxlan"' in build
    assert found["ready"] == found["registry_up"] == found['lease_state{state="held"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("lease_state")) == 1
    now = found["registry_last_sync_timestamp_seconds"]
    assert 3590 < found["lease_expiry_timestamp_seconds"] - now < 3610
    assert found["registry_revision"] == 4711
    assert found['drift_repaired_total{object="routes"}'] == 2
    assert found['drift_repaired_total{object="links"}'] == 0
    assert (found['mtu_bytes{scope="overlay"}'], found['mtu_bytes{scope="underlay"}']) == (1450, 1500)
    assert found['peers{state="accepted"}'] == 1
    assert (found['subnets{state="leased"}'], found['subnets{state="reserved"}']) == (1, 1)
    assert found['subnets{state="free"}'] == 255 - 2
    assert {value for name, value in found.items() if name.startswith("health_reporter")} == {1}


def test_when_nothing_is_known() -> None:
    found = values(Inbox())
    assert found["ready"] == found["registry_up"] == 0
    assert found['lease_state{state="none"}'] == 1
    unknown = ("lease_expiry", "registry_last_sync", "registry_revision", "registry_bad", "subnets", "mtu")
    assert not [name for name in found if name.startswith(unknown)]


def test_when_things_are_wrong() -> None:
    snapshot = Snapshot(5, 1, {OWN.key: OWN}, {"10.5.9.0-24": "PublicIP 7: expected an IPv4 address"})
    report = replace(WELL.report, failing={"routes": 3}, failing_from=boottime() - 60)
    wrong = replace(
        WELL,
        snapshot=snapshot,
        registry=RegistryState("unreachable", began=boottime() - 600),
        lease=LeaseState("conflict", WELL.lease.own),
        report=report,
    )
    found = values(inbox_with(wrong), hanging=("reconciler",))
    assert found["ready"] == found["registry_up"] == found['lease_state{state="held"}'] == 0
    assert found['lease_state{state="conflict"}'] == found["registry_bad_records"] == 1
    assert found['drift_current{object="routes"}'] == 3
    failing = {name for name, value in found.items() if name.startswith("health_reporter") and not value}
    names = ("threads", "lease", "registry", "kernel")
    ready = {f'health_reporter{{kind="ready",name="{name}"}}' for name in names}
    assert failing == ready | {'health_reporter{kind="live",name="threads"}'}


def test_durations_are_sorted_into_their_buckets() -> None:
    inbox = Inbox()
    for seconds in (0.0005, BOUNDS[0], 0.3, 60.0):
        inbox.counts.took("registry_request", seconds, "Txn")
    found = values(inbox)
    name = "registry_request_duration_seconds"
    buckets = {
        end: found[f'{name}_bucket{{le="{end}",op="Txn"}}']
        for end in ("0.001", "0.25", "0.5", "10.0", "+Inf")
    }
    assert (buckets["0.001"], buckets["0.25"], buckets["0.5"], buckets["10.0"]) == (2, 2, 3, 3)
    assert buckets["+Inf"] == found[f'{name}_count{{op="Txn"}}'] == 4
    assert found[f'{name}_sum{{op="Txn"}}'] == pytest.approx(60.3015)
    assert found["reconcile_duration_seconds_count"] == 0


def test_what_is_counted_is_shown() -> None:
    inbox = Inbox()
    inbox.counts.add("lease_renewals", "failed")
    inbox.counts.add("events", "put", by=7)
    inbox.counts.add("reconcile_failures", "all")
    inbox.counts.add("lease_conflicts")
    found = values(inbox)
    assert found['lease_renewals_total{result="failed"}'] == 1
    assert found['lease_renewals_total{result="ok"}'] == 0
    assert found['events_total{type="put"}'] == 7
    assert found['reconcile_failures_total{object="all"}'] == found["lease_conflicts_total"] == 1


def test_counts_are_told_apart_by_name() -> None:
    counts = Counts()
    counts.add("events", "put")
    assert counts.counted("registry_resyncs") == {}
    assert counts.timed("reconcile") == {}
