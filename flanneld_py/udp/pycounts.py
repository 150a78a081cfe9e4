"""What pypump.py counts, named as by pump.h and packet.h."""

from __future__ import annotations

DROP_REASONS = (
    "none", "too-short", "version", "header-length", "total-length", "header-checksum", "ttl-zero",
    "outer-source-unknown", "inner-destination", "inner-source", "ipv6-not-agreed", "no-route",
    "ttl-exceeded", "too-big", "offload", "send-failed", "queue-full", "write-failed", "truncated",
)  # fmt: skip
_TRAFFIC = (
    "packets", "bytes", "super-packets", "reads", "writes", "icmp-errors", "fragmented", "offload-refused",
    "read-errors", "busy-ms",
)  # fmt: skip
COUNTED = (*_TRAFFIC, *(f"drop.{reason}" for reason in DROP_REASONS[1:]))
"""In each direction."""
COUNTERS = tuple(f"{way}.{name}" for way in ("send", "receive") for name in COUNTED)
_PLACES = {name: place for place, name in enumerate(COUNTED)}


ONE_WAY = {
    "send": frozenset({"no-route", "ttl-exceeded", "too-big", "offload", "send-failed", "queue-full"}),
    "receive": frozenset({
        "header-checksum", "ttl-zero", "outer-source-unknown", "inner-destination", "inner-source",
        "write-failed",
    }),
}  # fmt: skip
"""Reasons that only this direction has; the counter of the other one stays 0."""


class Counts:
    """Those of one direction, in memory that both processes see; the other one only reads."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory

    def add(self, name: str, more: int = 1) -> None:
        self.memory[_PLACES[name]] += more

    def drop(self, reason: str, packets: int = 1) -> None:
        self.add(f"drop.{reason}", packets)
