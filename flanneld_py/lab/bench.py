"""What an overlay costs: throughput, packets a second and round trips between pods, by each backend.

All pairs of hosts stand side by side and take turns in every round, so that noise of the machine meets all
of them, and each figure is also given as a ratio to vxlan's of the same round. The hosts share this machine's
CPUs and memory: read the ratios, not the absolute figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from flanneld_py.lab.benchmachine import others_load
from flanneld_py.lab.benchpaths import PATHS, Pair, daemon_pair, peer_pair, routed_pair
from flanneld_py.lab.benchsamples import Sample, measure
from flanneld_py.lab.benchtables import LEGEND, table
from flanneld_py.lab.cnibench import BRIDGE, add_overhead
from flanneld_py.lab.overlays import OVERLAYS
from flanneld_py.lab.requirements import obstacle
from flanneld_py.lab.topology import Lab
from flanneld_py.lab.waiting import LabError

ROUNDS, SECONDS, TRIPS = 5, 2, 5000
MUCH = 0.25
"""Of the processors; with more than that taken by others the figures are theirs as well."""
UNDERLAYS = {"veth, with all its offloads": True, "segmentation and tunnel offloads off": False}
"""What the underlay is → whether its ports take packets of 64 KiB uncut, which no wire does."""

Say = Callable[[str], None]
Taken = dict[str, dict[str, list[Sample]]]
"""Underlay → path → a sample of each round."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int = ROUNDS
    seconds: int = SECONDS
    """Of each TCP stream, whole ones; of a UDP stream half."""
    trips: int = TRIPS
    peer: Path | None = None
    """Another program with flannel's flags, to be measured as well."""


def impossible() -> str | None:
    """Why the bench cannot run here; None when it can."""
    links = {overlay.link for overlay in OVERLAYS.values() if overlay.link}
    return obstacle(commands=["iperf3", "ethtool", str(BRIDGE)], links=links)


def bench(plan: Plan, say: Say = print, save: Path | None = None) -> None:
    """Measure all paths in turn and print a table for each of UNDERLAYS.

    Args:
        plan: how much.
        say: prints one line.
        save: a file that gets every sample as JSON.

    Raises:
        LabError: hardly anything arrived by one of the paths, or the peer does not start.
    """
    if plan.peer is not None and not os.access(plan.peer, os.X_OK):
        raise LabError(
            f"{plan.peer}: no program that can be executed; the peer is a binary with flannel's flags"
        )
    with Lab() as lab:
        say("CNI ADD is measured …")
        for line in add_overhead(lab):
            say(line)
        say("hosts start: " + ", ".join(["plain routes", *PATHS, *(["udp peer"] if plan.peer else [])]))
        pairs = [routed_pair(lab), *(daemon_pair(lab, path) for path in PATHS)]
        if plan.peer is not None:
            pairs.append(peer_pair(lab, plan.peer))
        taken, load = _take(pairs, plan, say)
    if save is not None:
        save.write_text(json.dumps(_plain(taken), indent=1) + "\n")
    for line in shown(taken):
        say(line)
    processors = len(os.sched_getaffinity(0))
    verdict = ": the figures are worth little" if median(load) > processors * MUCH else ""
    say(f"Others kept {median(load):.1f} of {processors} processors busy (at most {max(load):.1f}){verdict}.")


def _take(pairs: Sequence[Pair], plan: Plan, say: Say) -> tuple[Taken, list[float]]:
    """The samples, and how busy others kept the machine before each turn of all paths."""
    taken: Taken = {underlay: {pair.path: [] for pair in pairs} for underlay in UNDERLAYS}
    load = []
    for number in range(1, plan.rounds + 1):
        for underlay, offloaded in UNDERLAYS.items():
            for pair in pairs:
                for host in pair.hosts:
                    host.underlay.offload(host, on=offloaded)
            load.append(others_load())
            say(f"round {number} of {plan.rounds}, {underlay} (others keep {load[-1]:.1f} processors busy)")
            for pair in pairs:
                sample = measure(pair, plan.seconds, plan.trips)
                taken[underlay][pair.path].append(sample)
                say(_progress(pair.path, sample))
    return taken, load


def _progress(path: str, sample: Sample) -> str:
    return (
        f"  {path:<13} TCP {sample.tcp:5.1f}, by four {sample.tcp4:5.1f} Gbit/s, "
        f"UDP of 64 B {sample.small:4.0f}, of 1400 B {sample.large:4.0f} thousand/s, "
        f"round trip {sample.trip:4.0f} µs, p99 {sample.trip_p99:4.0f}"
    )


def shown(taken: Mapping[str, Mapping[str, Sequence[Sample]]]) -> list[str]:
    """The lines of all tables."""
    lines = []
    for underlay, samples in taken.items():
        rounds = len(next(iter(samples.values())))
        count = "one round" if rounds == 1 else f"{rounds} rounds"
        lines += ["", f"Underlay: {underlay}; {count}", *table(samples)]
    return [*lines, "", *LEGEND]


def _plain(taken: Taken) -> dict[str, dict[str, list[dict[str, float]]]]:
    return {
        underlay: {path: [asdict(sample) for sample in each] for path, each in samples.items()}
        for underlay, samples in taken.items()
    }
