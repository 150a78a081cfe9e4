"""A host is told once when the kernel's neighbour table is too small for its peers."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from flanneld_py.addresses import Family
from flanneld_py.core.admit import Peers
from flanneld_py.daemon.inbox import Inbox
from flanneld_py.daemon.neighbourlimit import NeighbourLimit
from tests.unit.strategies import host
from tests.unit.test_admit import peer


def told(
    limit: int | None, count: int, *, near: bool = True, looks: int = 1, mac: str = "02:00:00:00:00:01"
) -> list[Any]:
    here = replace(host(1), onlink=(ip_network("192.0.2.0/24" if near else "198.51.100.0/24"),))
    here = replace(here, external=replace(here.external, mac=mac))

    def of_kernel(family: Family) -> int | None:
        return limit if family == 4 else None

    inbox = Inbox()
    watch = NeighbourLimit(inbox, of_kernel)
    with capture_logs() as logs:
        for more in range(looks):
            accepted = tuple(peer(number) for number in range(2, 2 + count + more))
            report = replace(inbox.levels.report, peers=Peers(accepted))
            inbox.offer(host=here, report=report)
            watch.look()
    return [(log["event"], log["fix"]) for log in logs]


def test_more_than_there_is_room_for() -> None:
    fix = "sysctl -w net.ipv4.neigh.default.gc_thresh3=24, and the same in /etc/sysctl.d for the next boot"
    assert told(10, 12) == [("neighbours_limited", fix)]


def test_told_once() -> None:
    assert len(told(10, 12, looks=3)) == 1


@pytest.mark.parametrize(("limit", "near"), [(12, True), (None, True), (10, False)])
def test_enough_room_or_unknown_or_behind_a_router(limit: int | None, near: bool) -> None:
    assert told(limit, 12, near=near) == []


def test_no_entries_for_an_interface_that_needs_none() -> None:
    """Such as WireGuard's."""
    assert told(10, 12, mac="") == []
