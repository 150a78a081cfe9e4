"""The fourteen invariants: each is a pure function of a recording, to what violates it, a line each.

They import nothing of the product.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.chaos.registry_checks import (
    check_idempotence,
    check_ownership,
    check_stability,
    check_watch,
)
from tests.chaos.traffic_checks import check_fail_static, check_no_shrink, check_right_or_dropped
from tests.chaos.windows import touching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.chaos.recording import Recording
    from tests.chaos.windows import Done

    Check = Callable[[Recording], Iterator[str]]

MOST_CPU = 0.35
"""Of a core, on average over a daemon's life without its start …"""
START_CPU = 6.0
"""… which costs this many seconds at most."""
LONG_LIFE = 15.0
MOST_RSS = 160
MOST_THREADS = 40
MOST_DESCRIPTORS = 80
LINES_BEFORE, LINES_PER_FAULT = 120, 25
"""Of a host's logs: in any case, and for each fault."""
STOPS_WITHIN = 8.0
"""Promised are 5; some may pass until a busy machine has even delivered the signal."""
LOCKED = 78
"""Exit code of a daemon that finds another one in its place."""
SPOILED_FOR = 15.0
_FIRST_ALARM = 3.0
_MTU = re.compile(r"^FLANNEL_MTU=.*$", re.MULTILINE)


def check_convergence(run: Recording) -> Iterator[str]:
    for end in run.ends:
        for line in end.differences:
            yield f"{end.host}: kernel and registry differ: {line}"
        if end.rules_before != end.rules_after:
            yield f"{end.host}: packet-filter rules are not as they were:\n{end.rules_after or '(none)'}"


def check_collateral(run: Recording) -> Iterator[str]:
    for end in run.ends:
        for sign, rows, others in (
            ("gone", end.foreign_before, end.foreign_after),
            ("new", end.foreign_after, end.foreign_before),
        ):
            yield from (f"{end.host}: foreign, {sign}: {row}" for row in rows if row not in others)


def check_truth(run: Recording) -> Iterator[str]:
    """No false alarm while nothing is wrong, none that stays, and no silence about what lasts."""
    for end in run.ends:
        if end.status:
            yield f"{end.host} still says: {end.status}"
    for sample in run.seen.samples:
        wrong = sample.state != "in sync" or not sample.ready or sample.codes
        early = sample.at < run.began + _FIRST_ALARM or sample.at > run.stopped
        if (
            wrong
            and not early
            and sample.host in run.hosts
            and not touching(sample.host, sample.at, run.done)
        ):
            said = f"{sample.state}, ready={sample.ready}, {', '.join(sample.codes)}"
            yield f"{sample.host} raises a false alarm at {run.time(sample.at)}: {said}"
    yield from _silences(run)


def _silences(run: Recording) -> Iterator[str]:
    for fault in run.done:
        if not fault.told_after or fault.healed - fault.start < fault.told_after:
            continue
        for host in run.hosts if set(fault.targets).isdisjoint(run.hosts) else fault.targets:
            yield from _silence(run, fault, host)


def _silence(run: Recording, fault: Done, host: str) -> Iterator[str]:
    """Whether a host's daemon, which nobody kept from it, did not notice a fault that lasted."""
    if any(
        {f"daemon:{host}", "daemon:*"} & other.disables
        and other.start <= fault.healed
        and other.back + other.grace >= fault.start
        for other in run.done
    ):
        return
    during = [
        sample
        for sample in run.seen.samples
        if sample.host == host and fault.start + fault.told_after <= sample.at <= fault.healed
    ]
    if during and all(sample.ready and not sample.codes for sample in during):
        yield f"{host} calls all well during {fault} from {run.time(fault.start)} on"


def check_cost(run: Recording) -> Iterator[str]:
    lives: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for sample in run.seen.samples:
        lives.setdefault((sample.host, sample.pid), []).append((sample.at, sample.cpu))
        for what, value, most in (
            ("MiB of memory", sample.rss, MOST_RSS),
            ("threads", sample.threads, MOST_THREADS),
            ("descriptors", sample.descriptors, MOST_DESCRIPTORS),
        ):
            if value > most:
                yield f"{sample.host} has {value} {what} at {run.time(sample.at)}"
    for (host, pid), points in lives.items():
        seconds = points[-1][0] - points[0][0]
        if seconds > LONG_LIFE and (used := points[-1][1] - START_CPU) > MOST_CPU * seconds:
            yield f"{host}, process {pid}: {used:.1f} s of CPU in {seconds:.0f} s"
    most = LINES_BEFORE + LINES_PER_FAULT * len(run.done)
    yield from (f"{end.host} logged {end.log_lines} lines" for end in run.ends if end.log_lines > most)
    # Who came and left leaves his until it ends by itself, as does who is killed between grant and claim.
    if len(run.etcd_leases) > 2 * len(run.ends) + len(run.notes.joined):
        yield f"{len(run.etcd_leases)} leases in etcd for {len(run.ends)} hosts"


def check_repair(run: Recording) -> Iterator[str]:
    """In time: what is lost later than that is found by 5; here, what never was repaired before the end."""
    for flow in run.flows:
        if not flow.broken and flow.progress < run.stopped - 10:
            at = run.time(flow.progress) if flow.progress else "the beginning"
            yield f"TCP from {flow.source} to {flow.target} has made no progress since {at}"


def check_hand_off(run: Recording) -> Iterator[str]:
    """Only whole files, and for each host the subnet of its record, unless we spoiled it ourselves."""
    proper: dict[str, str] = {}
    keys = {event.owner: event.key for event in run.events if event.owner}
    for seen in run.seen.files:
        if seen.host not in run.hosts or any(
            at - 0.1 <= seen.at <= at + SPOILED_FOR for at in run.notes.spoiled.get(seen.host, ())
        ):
            continue
        if seen.text is None:
            yield f"{seen.host}: subnet.env is gone at {run.time(seen.at)}"
            continue
        names = [line.partition("=")[0] for line in seen.text.splitlines()]
        whole = seen.text.endswith("\n") and {"FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_MTU"} <= {*names}
        first = proper.setdefault(seen.host, seen.text)
        same = _MTU.sub("", seen.text) == _MTU.sub("", first)
        leased = keys.get(run.hosts[seen.host], "").removeprefix("subnets/").partition("-")[0]
        if f"\nFLANNEL_SUBNET={leased.removesuffix('.0')}." not in seen.text:
            yield f"{seen.host}: subnet.env at {run.time(seen.at)} does not name {leased}: {seen.text!r}"
        elif not whole or not same:
            yield f"{seen.host}: subnet.env at {run.time(seen.at)} is {seen.text!r} instead of {first!r}"


def check_exits(run: Recording) -> Iterator[str]:
    for ended in run.notes.exits:
        at = run.time(ended.at)
        if not ended.asked:
            yield f"{ended.host}'s daemon ended by itself with {ended.code} at {at}"
        if ended.asked == "second" and ended.code != LOCKED:
            yield f"a second daemon on {ended.host} was not refused by {at}: {ended.code}"
        if ended.asked == "SIGTERM" and (ended.code != 0 or ended.took > STOPS_WITHIN):
            yield f"{ended.host}'s daemon took {ended.took:.1f} s to stop at {at}, with code {ended.code}"
    for end in run.ends:
        yield from (f"{end.host} logged a traceback: {text}" for text in end.tracebacks)


INVARIANTS: dict[str, Check] = {
    "1 exclusive ownership": check_ownership,
    "2 stability": check_stability,
    "3 convergence": check_convergence,
    "4 no collateral": check_collateral,
    "5 fail-static": check_fail_static,
    "6 no shrink on error": check_no_shrink,
    "7 idempotence": check_idempotence,
    "8 truthful status": check_truth,
    "9 bounded cost": check_cost,
    "10 every packet right or dropped": check_right_or_dropped,
    "11 bounded repair": check_repair,
    "12 atomic hand-off file": check_hand_off,
    "13 clean exit": check_exits,
    "14 watch contract": check_watch,
}
SHOWN = 12
"""Violations of one invariant; the rest are counted."""


def violations(run: Recording) -> dict[str, list[str]]:
    """Invariant → what violates it, of those that are violated."""
    found = {name: list(check(run)) for name, check in INVARIANTS.items()}
    return {name: lines for name, lines in found.items() if lines}
