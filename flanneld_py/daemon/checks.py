"""The named checks behind /healthz, /readyz and `ready` of the status: pure, from levels and a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import astuple

from flanneld_py.core.describe import WAITS
from flanneld_py.core.duration import duration
from flanneld_py.daemon.inbox import Levels, Problem, Report
from flanneld_py.model import Table

REGISTRY_GRACE = 60.0
"""Seconds for which an etcd that is away is no fault: a member restarts, a leader is elected. What is set up
keeps working, but what other hosts change is not followed."""
KERNEL_GRACE = 5.0
"""Seconds for which rows may be missing that are tried again: after 1, 2 and 4."""
LEASE_LEFT = 900.0
"""Seconds that a lease must have left. With a short TTL it is a third of it, as for the registry."""
PEER_SHARE = 0.1
"""Of the peers: one of several that cannot be set up, perhaps by a fault of its own, must not make all hosts
unready."""
PEER_TABLES: frozenset[Table] = frozenset({"fdb", "neighs", "nexthops", "routes"})
"""Their rows are the peers'; those of the others are what this host itself needs."""

FAILS_READINESS = {
    "host-interface": "interface",
    "subnet-file": "subnet-file",
    "forwarding-off": "forwarding",
    "traffic-dropped": "packet-filter",
    "data-plane": "data-plane",
}
"""Code of a problem → the check that fails as long as a level has it."""
NEEDED_TO_START = ("lease", "subnet-file")
"""What READY tells systemd, once: Docker may be started. It must not wait for what a firewall may drop or
another host do wrong, which would keep the whole machine from starting."""


class Check(Struct, frozen=True):
    """What one part of the daemon says of itself."""

    name: str
    ok: bool
    state: str
    """`unreachable`, `held 10.5.7.0/24`."""
    why: str = ""
    since: float | None = None
    """When this state began, by `boottime`; None: it matters to nobody."""
    ends: float | None = None
    """When it will end by itself."""
    tolerated: float | None = None
    """Seconds for which it is no fault."""

    @property
    def reason(self) -> str:
        """Without times, so that it changes only when something has changed."""
        return self.state + (f": {' '.join(self.why.splitlines())}" if self.why else "")

    def line(self, now: float) -> str:
        """`[-] registry: unreachable for 72 s: connection refused`."""
        times = f" for {duration(now - self.since)}" if self.since is not None else ""
        times += f", {duration(self.ends - now)} left" if self.ends is not None else ""
        times += f", tolerated for {duration(self.tolerated)}" if self.tolerated is not None else ""
        why = self.reason.removeprefix(self.state)
        return f"[{'+' if self.ok else '-'}] {self.name}: {self.state}{times}{why}"


def live_checks(hanging: Collection[str]) -> tuple[Check, ...]:
    """Whether the process works at all, whatever etcd and the kernel say.

    `hanging`: names of threads that have ended or did not show in time that they turn.
    """
    state = f"not turning: {', '.join(hanging)}" if hanging else "all turn"
    return (Check("threads", not hanging, state),)


def ready_checks(levels: Levels, now: float, hanging: Collection[str] = ()) -> tuple[Check, ...]:
    """Whether containers started here now are connected, and will be; `now` by `boottime`."""
    return (
        *live_checks(hanging),
        _config(levels),
        _lease(levels, now),
        _registry(levels, now),
        _kernel(levels, now),
        *_by_problem(levels),
    )


def is_ready(checks: Collection[Check]) -> bool:
    return all(check.ok for check in checks)


def _config(levels: Levels) -> Check:
    network, problem = levels.network_in_force, levels.config_problem
    if network is None:
        return Check("config", False, "none in force", problem.reason if problem else "")
    nets = ", ".join(str(net) for net in network.config.networks)
    return Check("config", True, f"{network.backend.type} in {nets}", problem.reason if problem else "")


def _lease(levels: Levels, now: float) -> Check:
    lease, snapshot = levels.lease, levels.snapshot
    why = lease.problem.reason if lease.problem else ""
    if lease.own is None or lease.state != "held":
        return Check("lease", False, lease.state, why)
    record = lease.own.record
    state = f"held {', '.join(str(net) for net in record.subnets.values())}"
    if levels.awaits_lease:
        return Check("lease", False, state, "the config that was taken over does not allow it")
    if snapshot is not None and record.key not in snapshot.records:
        return Check("lease", False, "not in the registry", f"{record.key} is claimed again")
    if lease.recalled:
        # Without etcd that has to do; with it, it will not be long.
        return Check("lease", levels.recalled is not None, f"{state}, not confirmed by etcd yet", why)
    if lease.ends is not None and lease.ends - now < min(lease.own.ttl / 3, LEASE_LEFT):
        return Check("lease", False, state, "about to end: it could not be renewed", ends=lease.ends)
    return Check("lease", True, state, ends=lease.ends)


def _registry(levels: Levels, now: float) -> Check:
    registry = levels.registry
    where = registry.endpoint or "etcd"
    if registry.state == "in sync":
        return Check("registry", True, f"in sync with {where}")
    if levels.recalled is not None:
        state = f"{registry.state}, running on state of {levels.recalled.of}"
        return Check("registry", False, state, registry.error or "", since=registry.began)
    ttl = levels.lease.own.ttl if levels.lease.own else 0
    grace = min(REGISTRY_GRACE, ttl / 3) if ttl else REGISTRY_GRACE
    tolerable = levels.snapshot is not None and now - registry.began < grace
    return Check(
        "registry",
        tolerable,
        registry.state,
        registry.error or "",
        since=registry.began,
        tolerated=grace if tolerable else None,
    )


def _kernel(levels: Levels, now: float) -> Check:
    report = levels.report
    if not report.passes and report.problem is None:
        found = "not looked at yet; what the last run set up is left as it is"
        return Check("kernel", False, found if levels.inherited else "nothing set up yet")
    since = report.failing_from
    if since is None:
        return Check("kernel", True, "as it should be")
    state, why = "not as it should be", report.problem.reason if report.problem else ""
    if report.failed and not why:
        why = first_failure(report.failed)
    if now - since < KERNEL_GRACE and report.passes:
        return Check("kernel", True, state, why, since, tolerated=KERNEL_GRACE)
    if report.problem is None and _concerns_few_peers(report):
        return Check("kernel", True, "as it should be but for some peers", why, since)
    return Check("kernel", False, state, why, since)


def first_failure(failed: Sequence[tuple[str, str]]) -> str:
    """The first of these (op, error) that does not just wait for another, and how many there are."""
    roots = [row for row in failed if not row[1].startswith(WAITS)] or list(failed)
    op, error = roots[0]
    waiting = len(failed) - len(roots)
    more = f", and {waiting} more wait for others" if waiting else ""
    return f"{op}: {error} ({len(roots)} in all{more})"


def _concerns_few_peers(report: Report) -> bool:
    own = any(count for table, count in report.failing.items() if table not in PEER_TABLES)
    most = max((count for table, count in report.failing.items() if table in PEER_TABLES), default=0)
    peers = len(report.peers.accepted)
    return not own and most <= max(PEER_SHARE * peers, 1 if peers > 1 else 0)


def _by_problem(levels: Levels) -> Iterator[Check]:
    """The checks of FAILS_READINESS."""
    found: dict[str, Problem] = {}
    for problem in astuple(levels):
        if isinstance(problem, Problem) and problem.code in FAILS_READINESS:
            found.setdefault(FAILS_READINESS[problem.code], problem)
    for name in dict.fromkeys(FAILS_READINESS.values()):
        if name in found:
            yield Check(name, False, "in trouble", found[name].reason)
        else:
            yield _without_problem(name, levels)


def _without_problem(name: str, levels: Levels) -> Check:
    if name == "interface":
        external = levels.host.external if levels.host else None
        if external is None:
            return Check(name, False, "none chosen yet")
        return Check(name, True, " ".join([external.name, *map(str, external.addresses.values())]))
    if name == "subnet-file":
        written = levels.report.subnet_file_written
        old = "not written yet; that of the last run stands" if levels.inherited else "not written yet"
        return Check(name, written, "written" if written else old)
    if name == "data-plane":
        plane = levels.data_plane
        return Check(name, True, f"{plane.runs} on {plane.device}" if plane else "the kernel's")
    return Check(name, True, "no trouble known")
