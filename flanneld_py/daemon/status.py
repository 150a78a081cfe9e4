"""The status: one JSON object made from the levels, the same for the socket, the file and systemd."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from flanneld_py import __version__
from flanneld_py.backends.base import options_of
from flanneld_py.core.admit import OTHER_BACKEND, OUTSIDE
from flanneld_py.core.records import shortened
from flanneld_py.daemon.checks import NEEDED_TO_START, first_failure, is_ready, ready_checks
from flanneld_py.daemon.inbox import LeaseState, Levels, Problem, boottime, utc_now
from flanneld_py.model import External

WAYS = {"send": "tx", "receive": "rx"}
"""Directions of the data plane as it names them, and as everybody else is told."""
SHOWN_FAILURES = 20
SHOWN_BAD = 50
IF_GONE = "if it is gone, remove its record (flannelctl leases release)"
WAITING = {
    "config-missing",
    "config-invalid",
    "host-interface",
    "lease-waiting",
    "lease-conflict",
    "registry-unreachable",
}


class Process(Struct, frozen=True):
    """What the status says of the process itself."""

    pid: int
    prefix: str
    node_id: str
    hanging: Callable[[], Collection[str]] = tuple
    """Threads that do not turn."""
    traffic: Callable[[], Mapping[str, int]] = dict
    """What the data plane has counted, if it is ours."""


def compose(
    levels: Levels,
    process: Process,
    *,
    stopped: bool = False,
    ended: Problem | None = None,
    now: float | None = None,
) -> dict[str, Any]:
    """The status object (docs/architecture.md, "Status").

    Args:
        levels: the latest of everything.
        process: what it says of itself.
        stopped: whether this is its last word.
        ended: why it is, when nobody asked for that.
        now: by `boottime`; None: at this moment.
    """
    stopped = stopped or ended is not None
    checks = ready_checks(levels, boottime() if now is None else now, () if stopped else process.hanging())
    problems = [*([ended] if ended else []), *find_problems(levels)]
    lease, host, report, network = levels.lease, levels.host, levels.report, levels.network_in_force
    record = lease.own.record if lease.own else None
    return {
        "version": __version__,
        "pid": process.pid,
        "state": "stopped" if stopped else _state(levels, problems),
        "ready": not stopped and is_ready(checks),
        "checks": {check.name: {"ok": check.ok, "reason": check.reason} for check in checks},
        "prefix": process.prefix,
        "node_id": host.node_id if host else process.node_id,
        "backend": network.backend.type if network else None,
        "options": options_of(network.backend) if network else {},
        "networks": [str(net) for net in network.config.networks] if network else [],
        "subnets": [str(net) for net in record.subnets.values()] if record else [],
        "inherited": [] if report.subnet_file_written else [str(net) for net in levels.inherited],
        "mtu": report.mtu,
        "offloads": {dev: "on" if on else "off" for dev, on in report.offloads.items()},
        "rules_by": report.rules_by,
        "data_plane": _data_plane(levels, process.traffic()),
        "external": _external(host.external) if host else None,
        "lease": _lease(lease),
        "registry": {
            "state": levels.registry.state,
            "endpoint": levels.registry.endpoint,
            "error": levels.registry.error,
            "since": levels.registry.since,
            "running_on_state_of": levels.recalled.of if levels.recalled else None,
            "revision": levels.snapshot.revision if levels.snapshot else None,
        },
        "peers": {"count": len(report.peers.accepted), "held": report.held, **_bad(levels)},
        "drift": {
            "repaired": dict(report.repaired),
            "ops": {"set": report.ops.get("set", 0), "del": report.ops.get("del", 0)},
            "failed": [{"op": op, "error": error} for op, error in report.failed[:SHOWN_FAILURES]],
        },
        "problems": [asdict(problem) for problem in problems],
    }


def _lease(lease: LeaseState) -> dict[str, Any]:
    record = lease.own.record if lease.own else None
    return {
        "state": lease.state,
        "key": record.key if record else None,
        "ttl": lease.own.ttl if lease.own else None,
        "etcd_lease": f"{record.etcd_lease:x}" if record else None,
        "reason": lease.problem.reason if lease.problem else None,
    }


def _external(external: External) -> dict[str, Any]:
    return {
        "name": external.name,
        "mtu": external.mtu,
        "addresses": [str(ip) for ip in external.addresses.values()],
        "public": [str(ip) for ip in external.public.values()],
        "how": external.how,
    }


def _data_plane(levels: Levels, traffic: Mapping[str, int]) -> dict[str, Any] | None:
    plane = levels.data_plane
    if plane is None:
        return None
    return {
        "device": plane.device,
        "runs": plane.runs or None,
        "why": plane.why or None,
        "pid": plane.pid,
        "port": plane.port,
        "offloads": list(plane.offloads),
        "restarts": plane.restarts,
        "traffic": {
            label: {
                "packets": traffic.get(f"{way}.packets", 0),
                "drops": {
                    name.removeprefix(f"{way}.drop."): number
                    for name, number in traffic.items()
                    if number and name.startswith(f"{way}.drop.")
                },
            }
            for way, label in WAYS.items()
        },
    }


def compose_peers(levels: Levels, process: Process) -> dict[str, Any]:
    """What this host makes of the readable records, all of them, for `flannelctl leases`."""
    return {
        "prefix": process.prefix,
        "node_id": levels.host.node_id if levels.host else process.node_id,
        "judged": levels.report.passes > 0,
        "rejected": dict(levels.report.peers.rejected),
        "doubtful": dict(levels.report.peers.doubtful),
    }


def _bad(levels: Levels) -> dict[str, Any]:
    """Some of the records that are left out, and how many there are."""
    bad = {**levels.report.peers.rejected, **(levels.snapshot.bad if levels.snapshot else {})}
    shown = islice(bad.items(), SHOWN_BAD)
    return {"bad": {shortened(key): shortened(reason) for key, reason in shown}, "bad_count": len(bad)}


def is_set_up(levels: Levels) -> bool:
    """Whether containers can have been started: subnet.env was written, and nobody else has the lease."""
    return levels.report.subnet_file_written and levels.lease.state in ("held", "lost")


def find_problems(levels: Levels) -> Iterator[Problem]:
    """Everything an operator should know, most fundamental first."""
    registry = levels.registry
    if registry.state in ("unreachable", "refused"):
        fix = (
            "start etcd, or correct --etcd-endpoints (FLANNELD_ETCD_ENDPOINTS); what is set up keeps working"
            if registry.state == "unreachable"
            else "correct the credentials or certificates given by --etcd-* (FLANNELD_ETCD_*)"
        )
        reason = registry.error or "no answer"
        if levels.recalled is not None:
            reason = f"running on state of {levels.recalled.of}: {reason}"
        yield Problem(f"registry-{registry.state}", reason, fix, registry.since)
    for problem in (
        levels.overlap_problem,
        levels.config_problem,
        levels.host_problem,
        levels.subnet_file_problem,
        levels.forwarding_problem,
        levels.checksum_problem,
        levels.filter_problem,
        levels.data_plane_problem,
        levels.memory_problem,
        levels.loss_problem,
        levels.fallback_problem,
        _lease_problem(levels),
        levels.report.problem,
    ):
        if problem is not None:
            yield problem
    if levels.report.passes:
        yield from _left_out(levels)
    if levels.report.failed:
        yield Problem(
            "apply-failed",
            first_failure(levels.report.failed),
            "remove the cause; it is tried again by itself",
            levels.report.failing_since,
        )


def _lease_problem(levels: Levels) -> Problem | None:
    network, own = levels.network, levels.lease.own
    if levels.lease.problem is not None or network is None or own is None or not levels.awaits_lease:
        return levels.lease.problem
    nets = ", ".join(str(net) for net in network.config.networks)
    return Problem(
        "lease-waiting",
        f"the config that was taken over, {network.backend.type} in {nets}, does not allow "
        f"{own.record.key}: until another lease is held what was set up before stays in force",
        "none is needed but for etcd to take the write, which is tried again by itself",
        network.since,
    )


def _left_out(levels: Levels) -> Iterator[Problem]:
    rejected = levels.report.peers.rejected
    bad = levels.snapshot.bad if levels.snapshot else {}
    left = {**rejected, **bad}
    if not left:
        return
    key, reason = next(iter(left.items()))
    if key in bad:
        fix = "correct it, or delete it: flannelctl leases release --force"
    elif OUTSIDE not in reason and not reason.startswith(OTHER_BACKEND):
        fix = "correct that host's configuration, or remove its record if it is gone"
    elif levels.config_problem is not None and levels.config_problem.code == "config-pending":
        fix = f"if that host has taken over what is pending here: flannelctl config apply; {IF_GONE}"
    else:
        fix = f"take the stored config over there, too: flannelctl config apply on that host; {IF_GONE}"
    since = levels.report.peers_left_out_since or utc_now()
    yield Problem("peers-left-out", f"{shortened(key)}: {shortened(reason)} ({len(left)} in all)", fix, since)


def may_start(status: dict[str, Any]) -> bool:
    """Whether what needs subnet.env may be started, as READY tells systemd."""
    return status["state"] != "stopped" and all(status["checks"][name]["ok"] for name in NEEDED_TO_START)


def why_not_ready(status: dict[str, Any]) -> str:
    """The checks that fail, in a line: `registry: unreachable: connection refused`."""
    failing = (f"{name}: {check['reason']}" for name, check in status["checks"].items() if not check["ok"])
    return "; ".join(failing)


def what_stays(backend: str | None) -> str:
    """What becomes of the overlay while no daemon runs."""
    if backend == "udp":
        return "nobody forwards: containers are cut off until it runs again"
    return "the data plane stays"


def one_line(status: dict[str, Any]) -> str:
    """The status in a line, for `systemctl status`."""
    if status["state"] == "stopped":
        return f"stopped; {what_stays(status['backend'])}"
    if status["problems"]:
        reason = " ".join(status["problems"][0]["reason"].splitlines())
        return f"{status['state']}: {reason}"
    if status["backend"] is None:
        return f"{status['state']}: registry {status['registry']['state']}"
    subnets = " ".join(status["subnets"])
    return f"{status['state']}: {status['backend']} {subnets}, {status['peers']['count']} peers"


def _state(levels: Levels, problems: list[Problem]) -> str:
    # Another host's record is a problem of the network, but no fault of this host's.
    problems = [problem for problem in problems if problem.code != "peers-left-out"]
    if not problems:
        return "in sync" if levels.report.in_sync else "starting" if not is_set_up(levels) else "working"
    if not is_set_up(levels):
        return "waiting" if any(problem.code in WAITING for problem in problems) else "degraded"
    return "degraded"
