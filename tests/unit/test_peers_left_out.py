"""What the status says of records that are left out, and what to do about them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from flanneld_py.core.admit import Peers
from flanneld_py.daemon.inbox import Problem
from flanneld_py.model import Snapshot
from tests.unit.test_status import PEER, WELL, status

OUTSIDE = "subnet 10.6.3.0/24 lies outside the Network 10.5.0.0/16"
PENDING = Problem("config-pending", "Network 10.5.0.0/16 becomes 10.6.0.0/16", "flannelctl config apply")


@pytest.mark.parametrize(
    ("reason", "pending", "advice"),
    [
        (
            OUTSIDE,
            None,
            "flannelctl config apply on that host",
        ),
        (
            OUTSIDE,
            PENDING,
            "pending here: flannelctl",
        ),
        ("backend is host-gw, this host's is vxlan", None, "flannelctl config apply on that host"),
        (
            "subnet 10.5.3.0/24 overlaps the older lease",
            PENDING,
            "correct that host's configuration",
        ),
    ],
)
def test_a_host_with_another_config_is_to_take_it_over(
    reason: str, pending: Problem | None, advice: str
) -> None:
    report = replace(WELL.report, peers=Peers((PEER,), {"10.6.3.0-24": reason}))
    found = status(replace(WELL, report=report, config_problem=pending))
    assert advice in found["problems"][-1]["fix"]


def test_an_unreadable_record_is_a_problem_by_itself() -> None:
    bad = {"10.5.9.0-24": "the value is not JSON"}
    (problem,) = status(replace(WELL, snapshot=Snapshot(5, 1, {}, bad)))["problems"]
    assert (problem["code"], problem["reason"]) == (
        "peers-left-out",
        "10.5.9.0-24: the value is not JSON (1 in all)",
    )
    assert "flannelctl leases release --force" in problem["fix"]
    assert problem["since"]
