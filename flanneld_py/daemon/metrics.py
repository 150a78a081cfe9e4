"""`/metrics`, in the formats of Prometheus and OpenMetrics: made of the levels when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http import HTTPStatus
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from flanneld_py.daemon.checks import live_checks, ready_checks
from flanneld_py.daemon.counts import BOUNDS, Durations
from flanneld_py.daemon.httpserver import Answer, Page
from flanneld_py.daemon.inbox import Inbox, boottime
from flanneld_py.daemon.metrictable import METRICS, PREFIX, Metric, Scrape
from flanneld_py.daemon.status import Process
from flanneld_py.drivers.counters import read_link_counters, read_udp_checksum_errors
from flanneld_py.errors import KernelError

ENDS = (*(str(bound) for bound in BOUNDS), "+Inf")


def metrics_page(inbox: Inbox, process: Process, look: Callable[[], None]) -> Page:
    """The page; `look` offers what no event tells of."""
    registry = CollectorRegistry()
    registry.register(_Daemon(inbox, process))
    ProcessCollector(registry=registry)

    def page(accept: str) -> Answer:
        look()
        encode, content_type = choose_encoder(accept)
        return Answer(HTTPStatus.OK, encode(registry), content_type)

    return page


class _Daemon(Collector):
    """Every metric of the table."""

    def __init__(self, inbox: Inbox, process: Process) -> None:
        self._inbox = inbox
        self._process = process

    def describe(self) -> list[Family]:
        """Names without values: to be registered, it need not be asked what is so."""
        return [_family(metric, {}) for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        now = self._scrape()
        for metric in METRICS:
            yield _family(metric, metric.read(now))

    def _scrape(self) -> Scrape:
        levels, now, hanging = self._inbox.levels, boottime(), self._process.hanging()
        errors = None
        with suppress(KernelError):
            errors = read_udp_checksum_errors()
        own = levels.report.own_links
        return Scrape(
            levels=levels,
            counts=self._inbox.counts,
            live=live_checks(hanging),
            ready=ready_checks(levels, now, hanging),
            boottime=now,
            unix_time=time.time(),
            udp_checksum_errors=errors,
            tunnels=read_link_counters(own) if own else (),
            traffic=self._process.traffic(),
        )


def _family(metric: Metric, values: Mapping[Any, Any]) -> Family:
    name, help_text = PREFIX + metric.name, metric.meaning
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, help_text, labels=metric.labels)
        for labels, durations in values.items():
            histogram.add_metric(labels, _buckets(durations), durations.seconds)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, help_text, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    return list(zip(ENDS, accumulate(durations.within), strict=True))
