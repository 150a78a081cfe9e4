"""How it grows: one daemon among 3 to 30,000 leases, real etcd and kernel, a peer program beside it."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from flanneld_py.lab.benchmachine import await_quiet, loop_turn, others_load, wake_trips, withheld
from flanneld_py.lab.overlays import OVERLAYS
from flanneld_py.lab.requirements import obstacle
from flanneld_py.lab.scaleruns import JOIN_REST, Joins, Start, measure_joins, measure_start
from flanneld_py.lab.scalesubjects import OURS, PEER, Subject, check_program
from flanneld_py.lab.topology import Lab

PYTHON = f"Python {platform.python_version()} of {sys.base_prefix}"
"""What runs the daemon, as it does this."""
BACKENDS = ("vxlan", "host-gw", "udp")
COUNTS = (100, 1_000, 5_000, 10_000, 30_000)
FITTED_FROM = 1_000
"""Leases from which on the growth is fitted: below, a start is mostly Python's own."""
PRESENT = (0, 3, 10_000)
JOINS, BURST, IDLE = 200, 1_000, 60.0
QUADRATIC = {"host-gw": 5_000}
"""Backend → leases above which a peer is not measured: Go flannel needs minutes there."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """How much is measured."""

    rounds: int = 3
    backends: Sequence[str] = BACKENDS
    counts: Sequence[int] = COUNTS
    present: Sequence[int] = PRESENT
    joins: int = JOINS
    burst: int = BURST
    idle: float = IDLE
    patience: float = 60.0
    """Seconds that are waited at most, before each turn, for a hypervisor that withholds processors."""
    peer: Path | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything of one run: subject → backend → leases → a sample of each round."""

    starts: dict[str, dict[str, dict[int, list[Start]]]]
    joins: dict[str, dict[int, list[Joins]]]
    load: list[float]
    """Processors that others kept busy, before each turn."""
    withheld: list[float]
    """Processors that had work and that the hypervisor let wait, during each sample."""
    pace: list[float]
    """Nanoseconds that a turn of a loop took then."""
    wakes: list[float]
    """Seconds of a message to a process that sleeps, and back, before joins."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "processors": len(os.sched_getaffinity(0)),
            "others_kept_busy": self.load,
            "withheld": self.withheld,
            "python": PYTHON,
            "loop_turn_ns": self.pace,
            "wake_trip_s": self.wakes,
            "starts": {
                subject: {
                    backend: {
                        str(count): [asdict(start) for start in taken] for count, taken in counts.items()
                    }
                    for backend, counts in backends.items()
                }
                for subject, backends in self.starts.items()
            },
            "growth": {
                subject: {backend: growth(counts) for backend, counts in backends.items()}
                for subject, backends in self.starts.items()
            },
            "joins": {
                subject: {str(present): [asdict(joins) for joins in taken] for present, taken in each.items()}
                for subject, each in self.joins.items()
            },
        }


def impossible_scale() -> str | None:
    """Why it cannot run here; None when it can."""
    return obstacle(links={overlay.link for overlay in OVERLAYS.values() if overlay.link})


def scale(plan: ScalePlan, say: Say) -> Measured:
    """Measure, in rounds, so that noise of the machine meets all of it.

    Raises:
        LabError: a daemon ended, or rows are missing.
    """
    check_program(plan.peer)
    subjects = [Subject(OURS), *([Subject(PEER, plan.peer)] if plan.peer else [])]
    measured = Measured({s.name: {} for s in subjects}, {s.name: {} for s in subjects}, [], [], [], [])
    with Lab() as lab:
        for number in range(1, plan.rounds + 1):
            turn = f"round {number} of {plan.rounds}"
            for backend in plan.backends:
                for count in plan.counts:
                    _look_round(plan, measured, say)
                    what = f"{backend}, {count} leases"
                    for subject in subjects:
                        if subject.program is not None and count > QUADRATIC.get(backend, count):
                            continue
                        with _watched(measured):
                            start = measure_start(lab, subject, backend, count)
                        by_count = measured.starts[subject.name].setdefault(backend, {})
                        by_count.setdefault(count, []).append(start)
                        say(f"{turn}, {subject.name}, {what}: {_said(start)} ({_noise(measured)})")
            for present in plan.present:
                _look_round(plan, measured, say)
                measured.wakes.extend(wake_trips(JOIN_REST))
                for subject in subjects:
                    with _watched(measured):
                        joins = measure_joins(
                            lab, subject, "vxlan", present, joins=plan.joins, burst=plan.burst, idle=plan.idle
                        )
                    measured.joins[subject.name].setdefault(present, []).append(joins)
                    said = f"{_joined(joins)} ({_noise(measured)})"
                    say(f"{turn}, {subject.name}, vxlan, {present} present: {said}")
    return measured


def _look_round(plan: ScalePlan, measured: Measured, say: Say) -> None:
    """Before a turn."""
    await_quiet(plan.patience, say)
    measured.load.append(others_load())
    measured.pace.append(loop_turn())


@contextmanager
def _watched(measured: Measured) -> Iterator[None]:
    """While a sample is taken."""
    before, began = withheld(), time.monotonic()
    yield
    measured.withheld.append((withheld() - before) / (time.monotonic() - began))


def _noise(measured: Measured) -> str:
    return (
        f"others keep {measured.load[-1]:.1f} processors busy, the hypervisor withheld "
        f"{measured.withheld[-1]:.2f}"
    )


def growth(counts: dict[int, list[Start]]) -> float | None:
    """The exponent of the number of leases with which the time to completeness grows, by least squares."""
    points = [
        (math.log(count), math.log(min(start.complete for start in taken)))
        for count, taken in counts.items()
        if count >= FITTED_FROM
    ]
    if len(points) < 2:
        return None
    return linear_regression(*zip(*points, strict=True)).slope


def _said(start: Start) -> str:
    return (
        f"subnet.env {start.ready * 1e3:.0f} ms, {start.ready_again * 1e3:.0f} with its lease; complete "
        f"{start.complete:.2f} s; {start.rss:.0f} MB, {start.cpu:.2f} s of CPU, {start.requests} requests"
    )


def _joined(joins: Joins) -> str:
    return (
        f"one join {joins.median * 1e3:.1f} ms, p99 {joins.p99 * 1e3:.1f}; burst {joins.burst * 1e3:.0f} ms; "
        f"renewal {joins.renewal_cpu:.2f} s of CPU; idle {joins.idle_cpu:.2f} s a minute; {joins.rss:.0f} MB"
    )


def tables(measured: Measured) -> list[str]:
    """The lines for the terminal: the best of all rounds, with the median in brackets."""
    lines = [
        "",
        "exec to …              leases   subnet.env  with a lease  complete (median)    MB  CPU s  requests",
    ]
    for subject, backends in measured.starts.items():
        for backend, counts in backends.items():
            for count, taken in counts.items():
                complete = sorted(start.complete for start in taken)
                lines.append(
                    f"{subject:<12}{backend:<9} {count:>7}"
                    f"{min(s.ready for s in taken) * 1e3:>10.0f} ms"
                    f"{min(s.ready_again for s in taken) * 1e3:>11.0f} ms"
                    f"{complete[0]:>8.2f} s ({median(complete):.2f})"
                    f"{min(s.rss for s in taken):>8.0f}{min(s.cpu for s in taken):>7.2f}"
                    f"{max(s.requests for s in taken):>7}"
                )
            exponent = growth(counts)
            if exponent is not None:
                lines.append(f"{'':<21} grows with leases to the power of {exponent:.2f}")
    lines += [
        "",
        "vxlan            present   one join, p99        burst    renewal  idle minute   MB  requests",
    ]
    for subject, each in measured.joins.items():
        for present, joined in each.items():
            lines.append(
                f"{subject:<16}{present:>7}"
                f"{min(j.median for j in joined) * 1e3:>9.1f}{min(j.p99 for j in joined) * 1e3:>7.1f} ms"
                f"{min(j.burst for j in joined) * 1e3:>9.0f} ms"
                f"{min(j.renewal_cpu for j in joined):>8.2f} s"
                f"{min(j.idle_cpu for j in joined):>10.2f} s"
                f"{min(j.rss for j in joined):>7.0f}{max(j.requests for j in joined):>8}"
            )
    wakes = sorted(measured.wakes)
    lines += [
        "",
        "Best of all rounds. Complete: the lesser of two starts, without and with a lease. MB: some seconds",
        "after the first start, as CPU and requests above; requests below: of joins, burst and renewal.",
        "Burst: from the last put to the last route; renewal, idle minute: seconds of processor time.",
        f"Others kept {median(measured.load):.1f} of {len(os.sched_getaffinity(0))} processors busy "
        f"(at most {max(measured.load):.1f}); the hypervisor withheld {median(measured.withheld):.2f} "
        f"(at most {max(measured.withheld):.2f}).",
        f"A turn of a loop that adds took {PYTHON} {min(measured.pace):.0f} to {max(measured.pace):.0f} ns: "
        "by that, machines and moments can be compared.",
        f"A byte to a process that sleeps, and back, between joins: {median(wakes) * 1e3:.2f} ms, "
        f"p99 {wakes[len(wakes) * 99 // 100] * 1e3:.1f}. A join wakes about five.",
    ]
    return lines


def save(measured: Measured, directory: Path) -> list[Path]:
    """JSON, and a plot as PNG and SVG where matplotlib is there; what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "scale.json"]
    written[0].write_text(json.dumps(measured.plain(), indent=1) + "\n")
    return written + _plot(measured, directory)


def _plot(measured: Measured, directory: Path) -> list[Path]:
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only here, and an extra
    except ImportError:
        return []
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for subject, backends in measured.starts.items():
        for backend, counts in backends.items():
            best = [(count, min(start.complete for start in taken)) for count, taken in counts.items()]
            style = "o-" if subject == OURS else "x--"
            axes.plot(*zip(*best, strict=True), style, label=f"{subject}, {backend}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="leases in etcd",
        ylabel="seconds",
        title="From the start of the daemon to a complete kernel",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    written = [directory / f"scale.{kind}" for kind in ("png", "svg")]
    for path in written:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return written
