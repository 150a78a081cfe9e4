"""The named checks: each fails when it should, for as long as it should, and says why in a line."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import fields, replace

from flanneld_py.core.admit import Peers
from flanneld_py.daemon.checks import (
    FAILS_READINESS,
    KERNEL_GRACE,
    LEASE_LEFT,
    REGISTRY_GRACE,
    Check,
    is_ready,
    live_checks,
    ready_checks,
)
from flanneld_py.daemon.inbox import DataPlane, LeaseState, Levels, Problem, RegistryState
from flanneld_py.model import OwnLease, Snapshot
from tests.unit.test_status import OWN, PEER, WELL

NOW = 10_000.0


def found(levels: Levels, now: float = NOW, hanging: tuple[str, ...] = ()) -> dict[str, Check]:
    return {check.name: check for check in ready_checks(levels, now, hanging)}


def failing(levels: Levels, now: float = NOW) -> list[str]:
    return [check.name for check in ready_checks(levels, now) if not check.ok]


def lines(levels: Levels, now: float = NOW) -> list[str]:
    return [check.line(now) for check in ready_checks(levels, now)]


def away(since: float, ttl: int = 86_400, state: str = "unreachable") -> Levels:
    return replace(
        WELL,
        registry=RegistryState(state, "http://192.0.2.9:2379", "connection refused", began=since),  # type: ignore[arg-type]
        lease=replace(WELL.lease, own=OwnLease(OWN, ttl), ends=None),
    )


def test_when_all_is_well() -> None:
    levels = replace(WELL, lease=replace(WELL.lease, ends=NOW + 23 * 3600 + 300))
    assert is_ready(ready_checks(levels, NOW))
    assert lines(levels) == [
        "[+] threads: all turn",
        "[+] config: vxlan in 10.5.0.0/16",
        "[+] lease: held 10.5.1.0/24, 23 h 5 min left",
        "[+] registry: in sync with http://192.0.2.9:2379",
        "[+] kernel: as it should be",
        "[+] interface: eth0 192.0.2.1",
        "[+] subnet-file: written",
        "[+] forwarding: no trouble known",
        "[+] packet-filter: no trouble known",
        "[+] data-plane: the kernel's",
    ]


def test_a_data_plane_of_ours_is_named_and_fails_readiness_when_it_does_not_turn() -> None:
    plane = DataPlane("flannel0", "python", "No module named '_pump'", 4711)
    working = replace(WELL, data_plane=plane)
    assert lines(working)[-1] == "[+] data-plane: python on flannel0"
    problem = Problem("data-plane", "pid 4711 was killed by signal 9", "none is needed")
    broken = replace(WELL, data_plane=replace(plane, runs=""), data_plane_problem=problem)
    assert lines(broken)[-1] == "[-] data-plane: in trouble: pid 4711 was killed by signal 9"
    assert not is_ready(ready_checks(broken, NOW))


def test_before_anything_is_known_nothing_is_ready_but_the_threads() -> None:
    fails = ["config", "lease", "registry", "kernel", "interface", "subnet-file"]
    assert failing(Levels()) == fails


def test_what_an_earlier_run_left_is_not_denied() -> None:
    """With etcd away after a restart it read "nothing set up yet" beside a subnet.env that stands."""
    assert [line for line in lines(Levels(inherited=OWN.subnets.values())) if "last run" in line] == [
        "[-] kernel: not looked at yet; what the last run set up is left as it is",
        "[-] subnet-file: not written yet; that of the last run stands",
    ]


# --- threads --------------------------------------------------------------------------------------


def test_threads_that_hang_are_named_and_are_all_that_liveness_depends_on() -> None:
    (check,) = live_checks(["lease-keeper", "reconciler"])
    assert check.line(NOW) == "[-] threads: not turning: lease-keeper, reconciler"
    assert not found(WELL, hanging=("reconciler",))["threads"].ok
    assert is_ready(live_checks([]))


# --- lease ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["none", "waiting", "conflict", "lost"])
def test_a_lease_that_is_not_held(state: str) -> None:
    problem = Problem("lease-conflict", "10.5.1.0-24 is held by\nnode b", "")
    levels = replace(WELL, lease=LeaseState(state, WELL.lease.own, problem))  # type: ignore[arg-type]
    assert failing(levels) == ["lease"]
    assert found(levels)["lease"].line(NOW) == f"[-] lease: {state}: 10.5.1.0-24 is held by node b"


@pytest.mark.parametrize(("ttl", "left"), [(86_400, LEASE_LEFT), (15, 5.0)])
def test_a_lease_about_to_end(ttl: int, left: float) -> None:
    levels = replace(WELL, lease=LeaseState("held", OwnLease(OWN, ttl), ends=NOW))
    assert failing(levels, NOW - left - 1) == []
    assert failing(levels, NOW - left + 1) == ["lease"]
    assert "about to end" in found(levels, NOW - left + 1)["lease"].reason


def test_a_lease_whose_record_is_gone_is_not_held() -> None:
    levels = replace(WELL, snapshot=Snapshot(5, 1, {PEER.key: PEER}))
    assert failing(levels) == ["lease"]


def test_a_reservation_does_not_end() -> None:
    levels = replace(WELL, lease=LeaseState("held", OwnLease(OWN, 0)))
    assert found(levels)["lease"].line(NOW) == "[+] lease: held 10.5.1.0/24"


# --- registry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["unreachable", "refused", "connecting"])
@pytest.mark.parametrize(("ttl", "grace"), [(86_400, REGISTRY_GRACE), (0, REGISTRY_GRACE), (15, 5.0)])
def test_a_registry_that_is_away_is_tolerated_for_a_while(state: str, ttl: int, grace: float) -> None:
    assert failing(away(NOW - grace + 1, ttl, state)) == []
    assert failing(away(NOW - grace - 1, ttl, state)) == ["registry"]


def test_how_a_registry_that_is_away_is_told() -> None:
    assert found(away(NOW - 12))["registry"].line(NOW) == (
        "[+] registry: unreachable for 12 s, tolerated for 1 min: connection refused"
    )
    assert found(away(NOW - 72))["registry"].line(NOW) == (
        "[-] registry: unreachable for 1 min 12 s: connection refused"
    )
    # What is published must not change with the time that goes by.
    assert found(away(NOW - 72))["registry"].reason == "unreachable: connection refused"


def test_a_registry_that_was_never_read_is_not_tolerated() -> None:
    assert "registry" in failing(replace(away(NOW - 1), snapshot=None))


# --- kernel ---------------------------------------------------------------------------------------


def broken(since: float, failing: dict[str, int], peers: int = 1) -> Levels:
    accepted = tuple(replace(PEER, key=f"10.5.{n}.0-24") for n in range(peers))
    report = replace(
        WELL.report,
        in_sync=False,
        peers=Peers(accepted, {}),
        failed=(("set route 10.5.2.0/24", "File exists"),),
        failing=failing,
        failing_from=since,
    )
    return replace(WELL, report=report)


def test_rows_that_fail_are_tolerated_for_a_moment() -> None:
    assert failing(broken(NOW - KERNEL_GRACE + 1, {"links": 1})) == []
    levels = broken(NOW - KERNEL_GRACE - 1, {"links": 1})
    assert failing(levels) == ["kernel"]
    assert found(levels)["kernel"].line(NOW) == (
        "[-] kernel: not as it should be for 6 s: set route 10.5.2.0/24: File exists (1 in all)"
    )


def test_a_pass_that_fails_as_a_whole() -> None:
    report = replace(WELL.report, problem=Problem("reconcile-failed", "no buffer", ""), failing_from=NOW - 1)
    assert failing(replace(WELL, report=report)) == []
    assert failing(replace(WELL, report=report), NOW + KERNEL_GRACE) == ["kernel"]
    # At the start nothing stands that would bridge the time.
    assert failing(replace(WELL, report=replace(report, passes=0))) == ["kernel"]


@pytest.mark.parametrize(
    ("rows", "peers", "ready"),
    [
        ({"routes": 1}, 1, False),
        ({"routes": 1, "neighs": 1, "fdb": 1, "nexthops": 1}, 10, True),
        ({"routes": 2}, 10, False),
        ({"routes": 1, "rules": 1}, 1000, False),
        ({"files": 1}, 1000, False),
        ({"routes": 1}, 0, False),
    ],
)
def test_one_peer_among_many_does_not_make_all_hosts_unready(
    rows: dict[str, int], peers: int, ready: bool
) -> None:
    levels = broken(NOW - 60, rows, peers)
    assert failing(levels) == ([] if ready else ["kernel"])
    assert "File exists" in found(levels)["kernel"].reason


# --- problems -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "name"), FAILS_READINESS.items())
def test_a_problem_of_the_table_fails_its_check_whichever_level_has_it(code: str, name: str) -> None:
    levels = [field.name for field in fields(Levels) if field.name.endswith("_problem")]
    assert len(levels) >= 4
    for level in levels:
        if level == "config_problem":
            continue  # shown by its own check
        problem: dict[str, Any] = {level: Problem(code, "the reason", "")}
        wrong = replace(WELL, **problem)
        assert failing(wrong) == [name]
        assert found(wrong)[name].line(NOW) == f"[-] {name}: in trouble: the reason"


def test_other_problems_are_no_reason() -> None:
    assert failing(replace(WELL, checksum_problem=Problem("bad-checksums", "many", ""))) == []


def test_a_config_that_is_not_taken_over_is_told_and_harmless() -> None:
    levels = replace(WELL, config_problem=Problem("config-pending", "Network differs", ""))
    assert found(levels)["config"].line(NOW) == "[+] config: vxlan in 10.5.0.0/16: Network differs"
    assert failing(replace(levels, network=None)) == ["config"]
