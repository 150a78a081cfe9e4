"""The status: every key always, and no good news after a fault."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from ipaddress import ip_network
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py import __version__
from flanneld_py.addresses import PerFamily
from flanneld_py.backends import backend_of
from flanneld_py.core.admit import Peers
from flanneld_py.daemon.checks import KERNEL_GRACE, REGISTRY_GRACE
from flanneld_py.daemon.inbox import (
    DataPlane,
    LeaseState,
    Levels,
    Network,
    Problem,
    RegistryState,
    Report,
    utc_now,
)
from flanneld_py.daemon.status import Process, compose, one_line
from flanneld_py.model import OwnLease, Record, Snapshot
from tests.unit import strategies
from tests.unit.strategies import PREFIX, host, subnet, thorough, underlay

PROCESS = Process(4711, PREFIX, "node-1")
SINCE = "2026-01-02T03:04:05.678Z"
NOW = 5000.0
RECENTLY, LONG_AGO = NOW - 0.5 * KERNEL_GRACE, NOW - 2 * REGISTRY_GRACE
OWN = Record(
    key="10.5.1.0-24",
    subnets=PerFamily(subnet(4, 1)),
    public_ips=PerFamily(underlay(4, 1)),
    etcd_lease=0x694D7AABBCCDD00F,
)
PEER = replace(OWN, key="10.5.2.0-24")
CONFIG = strategies.config()
WELL = Levels(
    network=Network(CONFIG, backend_of(CONFIG)),
    snapshot=Snapshot(4711, 1, {OWN.key: OWN, PEER.key: PEER}),
    registry=RegistryState("in sync", "http://192.0.2.9:2379", None, SINCE),
    host=host(1),
    lease=LeaseState("held", OwnLease(OWN, 86_400)),
    report=Report(
        passes=3,
        in_sync=True,
        subnet_file_written=True,
        mtu=1450,
        peers=Peers((PEER,), {}),
        repaired={"routes": 2},
        ops={"set": 12, "del": 1},
    ),
)

SHAPE = {
    "version": str,
    "pid": int,
    "state": str,
    "ready": bool,
    "checks": dict,
    "prefix": str,
    "node_id": str,
    "backend": str | None,
    "options": dict,
    "networks": [str],
    "subnets": [str],
    "inherited": [str],
    "mtu": int | None,
    "offloads": dict,
    "rules_by": str | None,
    "data_plane": None,
    "external": None,
    "lease": {
        "state": str,
        "key": str | None,
        "ttl": int | None,
        "etcd_lease": str | None,
        "reason": str | None,
    },
    "registry": {
        "state": str,
        "endpoint": str | None,
        "revision": int | None,
        "since": str,
        "error": str | None,
        "running_on_state_of": str | None,
    },
    "peers": {"count": int, "held": int, "bad": dict, "bad_count": int},
    "drift": {"repaired": dict, "ops": {"set": int, "del": int}, "failed": [{"op": str, "error": str}]},
    "problems": [{"code": str, "reason": str, "fix": str, "since": str}],
}
"""Every key that is promised, and what stands there."""
EXTERNAL_SHAPE = {"name": str, "mtu": int, "addresses": [str], "public": [str], "how": str}
DATA_PLANE_SHAPE = {
    "device": str,
    "runs": str | None,
    "why": str | None,
    "pid": int | None,
    "offloads": [str],
    "restarts": int,
}
OPTIONAL_SHAPES = {"external": EXTERNAL_SHAPE, "data_plane": DATA_PLANE_SHAPE}


def check_shape(found: Any, shape: Any, where: str = "status") -> None:
    if isinstance(shape, dict):
        assert set(found) == set(shape), where
        for key, part in shape.items():
            check_shape(found[key], part, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(found, list), where
        for item in found:
            check_shape(item, shape[0], where)
    elif shape is None:
        if found is not None:
            check_shape(found, OPTIONAL_SHAPES[where.rpartition(".")[2]], where)
    else:
        assert isinstance(found, shape), where


OTHER = replace(CONFIG, ranges=strategies.config(halves=True).ranges)
TAKEN_OVER = replace(
    WELL,
    network=Network(OTHER, backend_of(OTHER), since=SINCE),
    report=replace(WELL.report, network=WELL.network),
)
"""With a config that demands another lease than the one that is held."""


def test_a_config_that_awaits_its_lease_is_not_told_to_be_in_force() -> None:
    found = status(TAKEN_OVER)
    (problem,) = found["problems"]
    assert (problem["code"], problem["since"]) == ("lease-waiting", SINCE)
    assert "vxlan in 10.5.0.0/16, does not allow 10.5.1.0-24" in problem["reason"]
    assert (found["state"], found["ready"], found["checks"]["lease"]["ok"]) == ("degraded", False, False)
    told = Problem("lease-waiting", "no free subnet", "widen it")
    waiting = replace(TAKEN_OVER, lease=LeaseState("waiting", WELL.lease.own, told))
    assert [p["reason"] for p in status(waiting)["problems"]] == ["no free subnet"]
    assert TAKEN_OVER.network_in_force is WELL.network
    assert WELL.network_in_force is WELL.network
    moved = replace(OWN, subnets=PerFamily(ip_network("10.5.1.0/25")))
    held = replace(TAKEN_OVER, lease=LeaseState("held", OwnLease(moved, 86_400)))
    assert (held.network_in_force, status(held)["problems"]) == (TAKEN_OVER.network, [])


def status(levels: Levels, **more: Any) -> dict[str, Any]:
    """The status as a reader of the file or the socket gets it."""
    found: dict[str, Any] = json.loads(json.dumps(compose(levels, PROCESS, now=NOW, **more)))
    check_shape(found, SHAPE)
    return found


def problem(code: str) -> Problem:
    return Problem(code, f"reason of {code}", f"fix of {code}", SINCE)


# --- all combinations -----------------------------------------------------------------------------

REGISTRIES = {
    "connecting": RegistryState(since=SINCE, began=LONG_AGO),
    "in sync": WELL.registry,
    "unreachable": RegistryState("unreachable", "http://192.0.2.9:2379", "timed out", SINCE, RECENTLY),
    "refused": RegistryState("refused", "http://192.0.2.9:2379", "wrong password", SINCE, LONG_AGO),
}
LEASES = {
    "none": LeaseState(),
    "waiting": LeaseState("waiting", None, problem("lease-waiting")),
    "held": WELL.lease,
    "conflict": LeaseState("conflict", WELL.lease.own, problem("lease-conflict")),
    "lost": LeaseState("lost", WELL.lease.own, problem("lease-expired")),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "none yet": {"network": None},
    "missing": {"network": None, "config_problem": problem("config-missing")},
    "invalid": {"network": None, "config_problem": problem("config-invalid")},
    "good": {},
    "pending": {"config_problem": problem("config-pending")},
}
HOSTS: dict[str, dict[str, Any]] = {
    "unknown": {"host": None},
    "known": {},
    "lost": {"host_problem": problem("host-interface")},
}
REPORTS = {
    "none": Report(),
    "in sync": WELL.report,
    "at work": replace(WELL.report, in_sync=False),
    "failing": replace(
        WELL.report,
        in_sync=False,
        failed=(("set route 10.5.2.0/24", "No route"),),
        failing_since="2026-01-02T03:04:05.678Z",
        failing={"routes": 1},
        failing_from=LONG_AGO,
    ),
    "stuck": replace(WELL.report, in_sync=False, problem=problem("reconcile-failed"), failing_from=LONG_AGO),
    "no file": replace(WELL.report, in_sync=False, subnet_file_written=False),
}


@pytest.mark.parametrize("registry", REGISTRIES)
@pytest.mark.parametrize("lease", LEASES)
def test_every_combination_is_told_truthfully(registry: str, lease: str) -> None:
    for config, here, report in product(CONFIGS, HOSTS, REPORTS):
        levels = replace(
            WELL,
            registry=REGISTRIES[registry],
            lease=LEASES[lease],
            report=REPORTS[report],
            **CONFIGS[config],
            **HOSTS[here],
        )
        found = status(levels)
        faults = [problem["code"] for problem in found["problems"]]
        assert set(faults) == expected_problems(registry, lease, config, here, report)
        set_up = lease in ("held", "lost") and report not in ("none", "no file")
        assert found["ready"] == (set_up and expected_checks(registry, lease, config, here, report) == set())
        assert found["ready"] == all(check["ok"] for check in found["checks"].values())
        assert found["state"] == expected_state(set(faults), set_up, report)
        assert one_line(found).startswith(f"{found['state']}: ")
        assert "\n" not in one_line(found)


def expected_checks(registry: str, lease: str, config: str, here: str, report: str) -> set[str]:
    """Those that fail."""
    failing = {
        "config": config in ("none yet", "missing", "invalid"),
        "lease": lease != "held",
        "registry": registry in ("connecting", "refused"),
        "kernel": report in ("none", "failing", "stuck"),
        "interface": here != "known",
        "subnet-file": report in ("none", "no file"),
    }
    return {name for name, fails in failing.items() if fails}


def expected_problems(registry: str, lease: str, config: str, here: str, report: str) -> set[str]:
    said = {
        f"registry-{registry}": registry in ("unreachable", "refused"),
        f"config-{config}": config in ("missing", "invalid", "pending"),
        "host-interface": here == "lost",
        "lease-waiting": lease == "waiting",
        "lease-conflict": lease == "conflict",
        "lease-expired": lease == "lost",
        "reconcile-failed": report == "stuck",
        "peers-left-out": bool(REPORTS[report].peers.rejected),
        "apply-failed": report == "failing",
    }
    return {code for code, is_so in said.items() if is_so}


def expected_state(faults: set[str], ready: bool, report: str) -> str:
    if not faults - {"peers-left-out"}:
        # Whoever is in sync has done what was asked, and who never was has not begun.
        return "in sync" if report == "in sync" else "working" if ready else "starting"
    outside = {
        "config-missing",
        "config-invalid",
        "host-interface",
        "lease-waiting",
        "lease-conflict",
        "registry-unreachable",
    }
    return "waiting" if not ready and faults & outside else "degraded"


# --- by example -----------------------------------------------------------------------------------


def test_at_the_start() -> None:
    found = status(Levels())
    assert (found["state"], found["ready"], found["problems"]) == ("starting", False, [])
    assert (found["backend"], found["networks"], found["subnets"], found["mtu"]) == (None, [], [], None)
    assert (found["external"], found["lease"]["state"], found["registry"]["state"]) == (
        None,
        "none",
        "connecting",
    )


def test_when_all_is_well() -> None:
    assert status(WELL) == {
        "version": __version__,
        "pid": 4711,
        "state": "in sync",
        "ready": True,
        "checks": {
            "threads": {"ok": True, "reason": "all turn"},
            "config": {"ok": True, "reason": "vxlan in 10.5.0.0/16"},
            "lease": {"ok": True, "reason": "held 10.5.1.0/24"},
            "registry": {"ok": True, "reason": "in sync with http://192.0.2.9:2379"},
            "kernel": {"ok": True, "reason": "as it should be"},
            "interface": {"ok": True, "reason": "eth0 192.0.2.1"},
            "subnet-file": {"ok": True, "reason": "written"},
            "forwarding": {"ok": True, "reason": "no trouble known"},
            "packet-filter": {"ok": True, "reason": "no trouble known"},
            "data-plane": {"ok": True, "reason": "the kernel's"},
        },
        "prefix": "/coreos.com/network",
        "node_id": "node-1",
        "backend": "vxlan",
        "options": {
            "vni": 1,
            "port": 8472,
            "external_mtu": 0,
            "gbp": False,
            "learning": False,
            "direct_routing": False,
            "tx_checksum": "auto",
        },
        "networks": ["10.5.0.0/16"],
        "subnets": ["10.5.1.0/24"],
        "inherited": [],
        "mtu": 1450,
        "offloads": {},
        "rules_by": None,
        "data_plane": None,
        "external": {
            "name": "eth0",
            "mtu": 1500,
            "addresses": ["192.0.2.1"],
            "public": ["192.0.2.1"],
            "how": "",
        },
        "lease": {
            "state": "held",
            "key": "10.5.1.0-24",
            "ttl": 86_400,
            "etcd_lease": "694d7aabbccdd00f",
            "reason": None,
        },
        "registry": {
            "state": "in sync",
            "endpoint": "http://192.0.2.9:2379",
            "revision": 4711,
            "since": SINCE,
            "error": None,
            "running_on_state_of": None,
        },
        "peers": {"count": 1, "held": 0, "bad": {}, "bad_count": 0},
        "drift": {"repaired": {"routes": 2}, "ops": {"set": 12, "del": 1}, "failed": []},
        "problems": [],
    }
    assert one_line(status(WELL)) == "in sync: vxlan 10.5.1.0/24, 1 peers"


def test_etcd_gone_for_a_moment_keeps_ready_and_is_said() -> None:
    found = status(replace(WELL, registry=REGISTRIES["unreachable"]))
    assert (found["state"], found["ready"]) == ("degraded", True)
    assert found["problems"] == [
        {
            "code": "registry-unreachable",
            "reason": "timed out",
            "fix": "start etcd, or correct --etcd-endpoints (FLANNELD_ETCD_ENDPOINTS); what is set up keeps "
            "working",
            "since": SINCE,
        }
    ]
    assert one_line(found) == "degraded: timed out"


def test_stopped_is_never_ready() -> None:
    found = status(WELL, stopped=True)
    assert (found["state"], found["ready"]) == ("stopped", False)


def test_both_families_are_listed() -> None:
    config = strategies.config(families=(4, 6))
    own = replace(OWN, subnets=PerFamily(subnet(4, 1), subnet(6, 1)))
    found = status(
        replace(
            WELL,
            network=Network(config, backend_of(config)),
            lease=LeaseState("held", OwnLease(own, 0)),
            host=host(1, (4, 6)),
        )
    )
    assert found["networks"] == ["10.5.0.0/16", "fd00:5::/48"]
    assert found["subnets"] == ["10.5.1.0/24", "fd00:5:0:1::/64"]
    assert found["external"]["addresses"] == ["192.0.2.1", "2001:db8::1"]


def test_bad_records_and_rejected_peers_stand_together() -> None:
    found = status(
        replace(
            WELL,
            snapshot=Snapshot(5, 1, {}, {"10.5.9.0-24": "PublicIP 7: expected an IPv4 address"}),
            report=replace(WELL.report, peers=Peers((PEER,), {"10.5.3.0-24": "backend is host-gw"})),
        )
    )
    assert found["peers"] == {
        "count": 1,
        "held": 0,
        "bad": {"10.5.9.0-24": "PublicIP 7: expected an IPv4 address", "10.5.3.0-24": "backend is host-gw"},
        "bad_count": 2,
    }
    # One bad record of another host is no fault of this one, but somebody should know.
    assert found["state"] == "in sync"
    assert [problem["code"] for problem in found["problems"]] == ["peers-left-out"]
    assert found["problems"][0]["reason"] == "10.5.3.0-24: backend is host-gw (2 in all)"


def test_a_reservation_has_no_ttl() -> None:
    own = replace(OWN, etcd_lease=0)
    found = status(replace(WELL, lease=LeaseState("held", OwnLease(own, 0))))
    assert (found["lease"]["ttl"], found["lease"]["etcd_lease"]) == (0, "0")


def test_of_ten_thousand_failures_some_are_shown_and_all_are_counted() -> None:
    failed = tuple((f"set route 10.5.{n}.0/24", "No buffer space") for n in range(10_000))
    found = status(replace(WELL, report=replace(WELL.report, in_sync=False, failed=failed)))
    assert found["drift"]["failed"][0] == {"op": "set route 10.5.0.0/24", "error": "No buffer space"}
    assert 0 < len(found["drift"]["failed"]) <= 100
    assert "(10000 in all)" in found["problems"][0]["reason"]


def test_of_failures_that_wait_for_one_another_the_root_is_the_problem() -> None:
    waits = tuple(
        (f"set tunnel 10.5.{n}.0/24", "waits for data plane flannel0: port taken") for n in range(6)
    )
    report = replace(WELL.report, in_sync=False, failed=(*waits, ("set data plane flannel0", "port taken")))
    found = status(replace(WELL, report=report))
    reason = "set data plane flannel0: port taken (1 in all, and 6 more wait for others)"
    assert found["problems"][0]["reason"] == reason


def test_a_stopped_udp_host_is_cut_off_and_says_so() -> None:
    stopped = {"state": "stopped"}
    assert one_line({**stopped, "backend": "vxlan"}) == "stopped; the data plane stays"
    assert one_line({**stopped, "backend": "udp"}) == (
        "stopped; nobody forwards: containers are cut off until it runs again"
    )


@pytest.mark.parametrize("name", ["loss_problem", "fallback_problem"])
def test_traffic_that_is_lost_or_slow_is_a_problem_and_leaves_it_ready(name: str) -> None:
    """A stranger's flood must not take a host out of service."""
    told = {"loss_problem": "packets-dropped", "fallback_problem": "data-plane-python"}
    values: dict[str, Any] = {name: problem(told[name])}
    found = status(replace(WELL, **values))
    assert (found["state"], found["ready"]) == ("degraded", True)
    assert [item["code"] for item in found["problems"]] == [told[name]]


def test_drops_are_shown_by_direction_where_there_are_any() -> None:
    counters = {"send.packets": 7, "send.drop.no-route": 0, "receive.packets": 2, "receive.drop.version": 3}
    levels = replace(WELL, data_plane=DataPlane("flannel0", "native", port=8285))
    found = compose(levels, Process(1, "/p", "n", traffic=lambda: counters))["data_plane"]
    assert found["traffic"] == {
        "tx": {"packets": 7, "drops": {}},
        "rx": {"packets": 2, "drops": {"version": 3}},
    }


def test_of_ten_thousand_bad_records_some_are_shown_and_all_are_counted() -> None:
    garbage = {f"10.5.{n}.0-24{'x' * 1000}": "y" * 1000 for n in range(10_000)}
    rejected = {"10.5.3.0-24": "backend is host-gw"}
    report = replace(WELL.report, peers=Peers((PEER,), rejected))
    found = status(replace(WELL, snapshot=Snapshot(5, 1, {}, garbage), report=report))
    assert found["peers"]["bad_count"] == 10_001
    assert 10 <= len(found["peers"]["bad"]) <= 100
    assert found["peers"]["bad"].items() >= rejected.items()
    assert len(json.dumps(found)) < 100_000, "it is written again at each revision"


def test_problems_come_with_what_to_do() -> None:
    levels = replace(
        WELL,
        registry=REGISTRIES["refused"],
        config_problem=problem("config-pending"),
        host_problem=problem("host-interface"),
        lease=LEASES["lost"],
        report=REPORTS["failing"],
    )
    found = status(levels)
    codes = [item["code"] for item in found["problems"]]
    assert codes == ["registry-refused", "config-pending", "host-interface", "lease-expired", "apply-failed"]
    assert all(item["fix"] for item in found["problems"])
    assert found["lease"]["reason"] == "reason of lease-expired"


def test_times_are_utc_in_iso_8601() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", utc_now())
    for item in status(replace(WELL, report=REPORTS["failing"]))["problems"]:
        assert datetime.fromisoformat(item["since"]).tzinfo is not None


texts = st.text(max_size=20)


@thorough
@given(
    st.builds(Problem, texts, texts, texts) | st.none(),
    st.lists(st.tuples(texts, texts), max_size=3).map(tuple),
    st.dictionaries(texts, texts, max_size=3),
    st.sampled_from(sorted(REGISTRIES)),
)
def test_whatever_is_reported_is_json(
    reported: Problem | None, failed: tuple[tuple[str, str], ...], bad: Mapping[str, str], registry: str
) -> None:
    report = replace(WELL.report, failed=failed, problem=reported, peers=Peers((), bad))
    found = status(replace(WELL, report=report, registry=REGISTRIES[registry]))
    assert found["peers"]["bad"] == bad
    assert len(found["problems"]) == (reported is not None) + bool(failed) + bool(bad) + (
        registry in ("unreachable", "refused")
    )
    # To systemd a line break would be the end of STATUS= and the beginning of another assignment.
    assert len(one_line(found).splitlines()) == 1
