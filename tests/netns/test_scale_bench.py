"""`make bench SECTION=scale` measures what it says it measures."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import LabError, benchmachine
from flanneld_py.lab.scale import ScalePlan, growth, save, scale, tables
from flanneld_py.lab.scaleruns import Start
from flanneld_py.lab.scalesubjects import OURS, PEER, check_program
from tests.netns.test_bench import peer

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["peer"]
PLAN = ScalePlan(rounds=1, counts=(150,), present=(20,), joins=10, burst=60, idle=1, patience=1)
START = Start(ready=0.3, ready_again=0.3, complete=0.4, rss=50, cpu=0.3, requests=6)


def test_every_figure_is_measured_for_both(peer: Path, tmp_path: Path) -> None:
    said: list[str] = []
    measured = scale(replace(PLAN, peer=peer), said.append)
    for subject in (OURS, PEER):
        for backend in PLAN.backends:
            (start,) = measured.starts[subject][backend][150]
            assert 0 < start.ready <= start.complete + 60
            assert 0 < start.complete < 60
            assert 20 < start.rss < 200
            assert 0.1 < start.cpu < 60
            assert 3 <= start.requests <= 8, "as few as a daemon needs, and none for a lease"
        (joins,) = measured.joins[subject][20]
        assert len(joins.each) == 10
        assert all(0 < seconds < 30 for seconds in joins.each)
        assert joins.requests <= 2, "none for an event"
    samples = 2 * (len(PLAN.backends) + len(PLAN.present))
    assert len(measured.withheld) == samples
    assert all(processors >= 0 for processors in measured.withheld)
    shown = "\n".join(tables(measured))
    assert all(f"{subject:<12}{backend}" in shown for subject in (OURS, PEER) for backend in PLAN.backends)
    written = save(measured, tmp_path)
    assert {path.suffix for path in written} == {".json", ".png", ".svg"}
    assert json.loads(written[0].read_text())["starts"][OURS]["vxlan"]["150"][0]["requests"] <= 8


def test_what_the_hypervisor_withholds_is_steal() -> None:
    def steal() -> float:
        told = subprocess.check_output(["awk", "/^cpu /{print $9}", "/proc/stat"])
        return int(told) / os.sysconf("SC_CLK_TCK")

    before = steal()
    assert before <= benchmachine.withheld() <= steal()


def test_a_machine_that_is_never_quiet_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmachine, "_UNNOTICED", -1.0)
    said: list[str] = []
    benchmachine.await_quiet(2, said.append)
    (told,) = said
    assert "2 s at most" in told


def test_growth_is_the_exponent() -> None:
    def counts(power: float) -> dict[int, list[Start]]:
        return {n: [replace(START, complete=n**power / 1000)] for n in (100, 1_000, 5_000, 30_000)}

    assert math.isclose(growth(counts(1.0)) or 0, 1.0)
    assert math.isclose(growth(counts(2.0)) or 0, 2.0)
    assert growth({100: [START]}) is None


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="BENCH_PEER"):
        check_program(tmp_path / "nothing")
