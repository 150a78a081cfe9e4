"""The fuzz targets in Python, by name; the C core's own is tests/native/fuzz_packet.c."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.target import Target

NAMES = ("config", "keys", "records", "state", "cache", "subnetenv", "netlink", "nftables", "xtables", "cni")


def load(name: str) -> Target:
    """Imports it: an instrumenting importer may stand around this."""
    target: Target = import_module(f"tests.fuzz.{name}").TARGET
    return target
