"""The status: one JSON object made from the levels, the same for the socket, the file and systemd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from flanneld_py import __version__
from flanneld_py.core.configchange import overlaps_of_host
from flanneld_py.core.records import shortened
from flanneld_py.daemon.inbox import Levels, Problem

SHOWN_FAILURES = 20
SHOWN_BAD = 50
WAITING = {
    "config-missing",
    "config-invalid",
    "host-interface",
    "lease-waiting",
    "lease-conflict",
    "registry-unreachable",
}


@dataclass(frozen=True, slots=True)
class Process:
    """What the status says of the process itself."""

    pid: int
    prefix: str
    node_id: str


def compose(levels: Levels, process: Process, *, stopped: bool = False) -> dict[str, Any]:
    """The status object (docs/architecture.md, "Status")."""
    problems = list(find_problems(levels))
    lease, host, report, network = levels.lease, levels.host, levels.report, levels.network
    record = lease.own.record if lease.own else None
    return {
        "version": __version__,
        "pid": process.pid,
        "state": "stopped" if stopped else _state(levels, problems),
        "ready": not stopped and is_ready(levels),
        "prefix": process.prefix,
        "node_id": host.node_id if host else process.node_id,
        "backend": network.backend.type if network else None,
        "networks": [str(net) for net in network.config.networks] if network else [],
        "subnets": [str(net) for net in record.subnets.values()] if record else [],
        "mtu": report.mtu,
        "offloads": {dev: "on" if on else "off" for dev, on in report.offloads.items()},
        "external": {
            "name": host.external.name,
            "mtu": host.external.mtu,
            "addresses": [str(ip) for ip in host.external.addresses.values()],
            "public": [str(ip) for ip in host.external.public.values()],
            "how": host.external.how,
        }
        if host
        else None,
        "lease": {
            "state": lease.state,
            "key": record.key if record else None,
            "ttl": lease.own.ttl if lease.own else None,
            "etcd_lease": f"{record.etcd_lease:x}" if record else None,
            "reason": lease.problem.reason if lease.problem else None,
        },
        "registry": {
            **asdict(levels.registry),
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


def is_ready(levels: Levels) -> bool:
    """Whether containers may be started: subnet.env stands and the lease is ours."""
    return levels.report.subnet_file_written and levels.lease.state in ("held", "lost")


def find_problems(levels: Levels) -> Iterator[Problem]:
    """Everything an operator should know, most fundamental first."""
    registry = levels.registry
    if registry.state in ("unreachable", "refused"):
        fix = (
            "start etcd, or correct --etcd-endpoints; what is set up keeps working"
            if registry.state == "unreachable"
            else "correct the credentials or certificates given by the --etcd-* flags"
        )
        yield Problem(f"registry-{registry.state}", registry.error or "no answer", fix, registry.since)
    yield from _overlaps(levels)
    for problem in (
        levels.config_problem,
        levels.host_problem,
        levels.checksum_problem,
        levels.lease.problem,
        levels.report.problem,
    ):
        if problem is not None:
            yield problem
    rejected = levels.report.peers.rejected
    if rejected:
        key, reason = next(iter(rejected.items()))
        yield Problem(
            "peers-left-out",
            f"{shortened(key)}: {shortened(reason)} ({len(rejected)} in all)",
            "correct that host's configuration, or remove its record if it is gone",
            levels.report.peers_left_out_since,
        )
    if levels.report.failed:
        op, error = levels.report.failed[0]
        yield Problem(
            "apply-failed",
            f"{op}: {error} ({len(levels.report.failed)} in all)",
            "remove the cause; it is tried again by itself",
            levels.report.failing_since,
        )


def _overlaps(levels: Levels) -> Iterator[Problem]:
    own = levels.lease.own
    # Before the lease is known the bridge's address cannot be told from a stranger's.
    if levels.network is None or levels.host is None or own is None:
        return
    reasons = list(overlaps_of_host(levels.network.config, levels.host, own.record.subnets.values()))
    if reasons:
        yield Problem(
            "config-overlaps-host",
            f"{reasons[0]} ({len(reasons)} in all)" if len(reasons) > 1 else reasons[0],
            "choose a Network that no host is part of (flannelctl config check), or renumber this host",
            "",
        )


def one_line(status: dict[str, Any]) -> str:
    """The status in a line, for `systemctl status`."""
    if status["state"] == "stopped":
        return "stopped; the data plane stays"
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
        return "in sync" if levels.report.in_sync else "starting" if not is_ready(levels) else "working"
    if not is_ready(levels):
        return "waiting" if any(problem.code in WAITING for problem in problems) else "degraded"
    return "degraded"
