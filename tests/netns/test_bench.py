"""`make bench` measures what it says it measures."""

from __future__ import annotations

import re

from flanneld_py.lab.bench import PATHS, Sample, bench, name_of, table


def test_every_path_is_measured() -> None:
    lines: list[str] = []
    bench(rounds=1, seconds=1, say=lines.append)
    added = r"[0-9.]+ ms by bridge alone, [0-9.]+ ms by flannel, .* -?[0-9.]+ ms more .* ratio [0-9.]+ .*"
    for line, families in zip(lines, ("IPv4", "dual-stack"), strict=False):
        assert re.fullmatch(f"CNI ADD, {families}: {added}", line)
    rows = lines[-1 - len(PATHS) :]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == ["plain routes", *map(name_of, PATHS)]
    for row in rows:
        figures = [float(figure) for figure in re.findall(r"\d+\.?\d*", row)]
        assert len(figures) == 8
        assert all(figure > 0 for figure in figures)


def test_ratios_are_those_of_the_same_round() -> None:
    """Rounds twice as fast for all paths change no ratio."""
    routes = [Sample(throughput=10, round_trip=20), Sample(20, 10), Sample(10, 20)]
    vxlan = [Sample(throughput=5, round_trip=30), Sample(10, 15), Sample(5, 30)]
    row = table({"plain routes": routes, "vxlan": vxlan})[-1]
    assert re.split(r"\s{2,}", row) == ["vxlan", "5.0 (5.0 to 10.0)", "0.50", "30 (15 to 30)", "1.50"]
