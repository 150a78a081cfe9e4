"""What the bench measures of one way from pod to pod, once."""

from __future__ import annotations

from dataclasses import dataclass

from flanneld_py.lab.benchmachine import busy
from flanneld_py.lab.benchpaths import Pair
from flanneld_py.lab.datagrams import Delivery, datagram_stream, round_trips
from flanneld_py.lab.probes import tcp_throughput
from flanneld_py.lab.waiting import LabError

SMALL, LARGE = 64, 1400
"""Bytes of payload of the datagrams; the large ones fit every path's MTU."""
_STREAMS = 4
_LEAST_DELIVERED = 1000


@dataclass(frozen=True, slots=True)
class Sample:
    """All figures of one path in one round."""

    tcp: float
    """Gbit/s, one stream."""
    tcp_cpu: float
    """Processor seconds of the whole machine for a gigabyte of that stream."""
    tcp4: float
    """Gbit/s, four streams together."""
    small: float
    """Datagrams of SMALL bytes that arrived, thousands a second."""
    small_lost: float
    """Of 100 sent."""
    small_cpu: float
    """Processor microseconds of the whole machine for each that arrived."""
    large: float
    """The same of LARGE bytes."""
    large_lost: float
    trip: float
    """Median round trip, µs."""
    trip_p99: float


def measure(pair: Pair, seconds: int, trips: int) -> Sample:
    """One sample, which takes about 2 s more than three times `seconds`.

    Args:
        pair: of pods.
        seconds: of each TCP stream, whole ones, and not 0, which iperf3 takes for endless; half of it of each
            UDP stream.
        trips: round trips.

    Raises:
        LabError: hardly anything arrived.
    """
    address = pair.server.address
    before = busy()
    one = tcp_throughput(pair.client, pair.server, address, seconds).bits_per_second
    tcp_cpu = (busy() - before) / (one * seconds / 8e9)
    four = tcp_throughput(pair.client, pair.server, address, seconds, _STREAMS).bits_per_second
    before = busy()
    small = _delivered(pair, SMALL, seconds / 2)
    small_cpu = (busy() - before) / small.received * 1e6
    large = _delivered(pair, LARGE, seconds / 2)
    times = round_trips(pair.client, pair.server, address, trips)
    return Sample(
        tcp=one / 1e9,
        tcp_cpu=tcp_cpu,
        tcp4=four / 1e9,
        small=small.rate / 1e3,
        small_lost=small.lost * 100,
        small_cpu=small_cpu,
        large=large.rate / 1e3,
        large_lost=large.lost * 100,
        trip=times[len(times) // 2] * 1e6,
        trip_p99=times[len(times) * 99 // 100] * 1e6,
    )


def _delivered(pair: Pair, size: int, seconds: float) -> Delivery:
    delivery = datagram_stream(pair.client, pair.server, pair.server.address, size, seconds)
    if delivery.received < _LEAST_DELIVERED:
        raise LabError(f"{delivery.received} of {delivery.sent} datagrams of {size} bytes by {pair.path}")
    return delivery
