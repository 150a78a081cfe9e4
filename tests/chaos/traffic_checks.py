"""What the probes say: nothing is lost that no fault excuses, nothing goes astray, no route for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.registry_checks import networks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.chaos.recording import Recording

ON_THE_WAY = 2.0
"""Seconds before the end in which packets and what was noted of them may still be under way."""
ONE_LOSS = 2.0
"""Seconds: packets lost with less between them are told as one loss."""
LEFT_WITHIN, MOVED_WITHIN = 30.0, 5.0
"""Seconds after a record was deleted, or written, in which its route goes: one of IPv6 cannot be replaced by
another through another device."""


def check_fail_static(run: Recording) -> Iterator[str]:
    for way, sent in run.traffic.sent.items():
        source, target, version = way
        received = run.traffic.received.get(way, {})
        lost = sorted(
            (at, number)
            for number, at in sent.items()
            if number not in received
            and run.began <= at <= run.stopped - ON_THE_WAY
            and not any(window.excuses(source, target, at) for window in run.windows)
        )
        for burst in _bursts(at for at, _ in lost):
            yield (
                f"IPv{version} from {source} to {target}: {len(burst)} lost from {run.time(burst[0])} to "
                f"{run.time(burst[-1])}, which no fault excuses{_near(run, burst[0])}"
            )
    for flow in run.flows:
        if flow.broken:
            yield f"TCP from {flow.source} to {flow.target} broke: {flow.broken}"


def _bursts(times: Iterable[float]) -> list[list[float]]:
    bursts: list[list[float]] = []
    for at in times:
        if bursts and at - bursts[-1][-1] < ONE_LOSS:
            bursts[-1].append(at)
        else:
            bursts.append([at])
    return bursts


def _near(run: Recording, at: float) -> str:
    """What had begun last, and whether the machine had no time for us."""
    before = [fault for fault in run.done if fault.start <= at]
    last = f"; before that: {before[-1]} at {run.time(before[-1].start)}" if before else ""
    stalls = [took for began, took in run.seen.stalls if began - 1 <= at <= began + took + 1]
    return last + (f"; this machine stood still for {max(stalls):.1f} s then" if stalls else "")


def check_right_or_dropped(run: Recording) -> Iterator[str]:
    yield from run.traffic.wrong
    yield from (f"came twice: {line}" for line in run.traffic.doubled)
    for host, count in run.notes.astray.items():
        if count:
            yield f"{count} probes for other hosts reached {host}"


def check_no_shrink(run: Recording) -> Iterator[str]:
    """A route to a peer is deleted because its record is gone or leads elsewhere, or because we did it."""
    changed = [
        (event.at, event.at + (LEFT_WITHIN if event.value is None else MOVED_WITHIN), networks_of(event.key))
        for event in run.events
        if "/" in event.key
    ]
    for gone in run.routes_gone:
        if not run.began <= gone.at <= run.settled or not gone.destination.startswith(("10.5.", "fd00:5")):
            continue
        excused = any(at - 1 <= gone.at <= end for at, end, nets in changed if gone.destination in nets)
        stirred = any(
            (gone.host in fault.stirs or "*" in fault.stirs)
            and fault.start - 0.5 <= gone.at <= fault.healed + fault.grace
            for fault in run.done
        )
        if not excused and not stirred:
            near = _near(run, gone.at)
            yield f"{gone.host} lost its route to {gone.destination} at {run.time(gone.at)}{near}"
