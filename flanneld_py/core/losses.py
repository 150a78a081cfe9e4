"""Whether the overlay loses packets all the time: judged from what the data plane has counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from msgspec import Struct

EVERY, WINDOW = 1.0, 30.0
"""Seconds from a reading to the next one, and for which they count."""
RISES = 3
"""Readings with more drops than the one before, from which on it is no stray packet."""
QUIET, GAPS = 4.0, 2
"""Seconds without a drop after which it is over, or so many usual gaps between two if that is longer."""


class Reading(Struct, frozen=True):
    """Counters of drops at a time."""

    at: float
    """Seconds."""
    drops: Mapping[str, int]
    """`receive.outer-source-unknown` → how many since the start."""


class Advice(Struct, frozen=True):
    """What one kind of drop means, and what to do."""

    meaning: str
    fix: str


TOLD = {
    "send.send-failed": Advice(
        "packets to peers are refused by the socket",
        "look for a rule in OUTPUT that drops UDP port {port}, and for a route to each peer",
    ),
    "receive.outer-source-unknown": Advice(
        "packets come from an address that is no peer's",
        "find the sender (tcpdump -ni {interface} udp port {port}); if it is a host of the overlay, give it "
        "that address as --public-ip; else let a firewall keep it away",
    ),
    "receive.inner-destination": Advice(
        "a peer sends what is for another host's subnet",
        "see flannelctl leases on that peer: it must have the same lease of this host as there is here",
    ),
    "receive.inner-source": Advice(
        "a peer sends from addresses that are not its own, which SourceCheck forbids",
        'if that host routes for others\' containers set Backend.SourceCheck to "false"; else it forges',
    ),
    "receive.write-failed": Advice(
        "received packets are refused by {device}", "see ip link show {device}: it must be up"
    ),
}
"""Of the drops that mean lost traffic; what strangers may cause by a datagram of nonsense is none of them."""


def decide_losses(readings: Sequence[Reading]) -> tuple[str, ...]:
    """The drops of `TOLD` that go on, from readings of the last WINDOW seconds, oldest first."""
    return tuple(name for name in TOLD if _go_on(name, readings))


def latest(readings: Sequence[Reading], reading: Reading) -> tuple[Reading, ...]:
    """The readings to judge by from now on. One that comes too soon is left out, one that is old goes."""
    if readings and 0 <= reading.at - readings[-1].at < EVERY:
        return tuple(readings)
    return (*(one for one in readings if 0 <= reading.at - one.at <= WINDOW), reading)


def _go_on(name: str, readings: Sequence[Reading]) -> bool:
    rises = [
        later.at
        for earlier, later in pairwise(readings)
        if later.drops.get(name, 0) > earlier.drops.get(name, 0)
    ]
    if len(rises) < RISES:
        return False
    gap = (rises[-1] - rises[0]) / (len(rises) - 1)
    return readings[-1].at - rises[-1] <= max(QUIET, GAPS * gap)
