"""What the thread that looks after the data plane makes of what it sees."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.daemon.dataplane import DataPlaneWatch
from flanneld_py.daemon.inbox import Inbox, Levels
from flanneld_py.datapath import Plane, PumpSettings
from flanneld_py.udp.pump import Running
from flanneld_py.udp.tunnel import Look

SETTINGS = PumpSettings(
    IPv4Address("192.0.2.1"),
    8285,
    PerFamily(ip_network("10.5.1.0/24"), None),
    (ip_network("10.5.0.0/16"),),
    1472,
)
NATIVE = Running(4711, "native", "", ("tso",))
MISSING = Running(4711, "python", "the compiled extension is not installed", ())
CRASHED = Running(
    4711, "python", "native ended 3 times within a minute, last: pid 7 was killed by signal 11", ()
)
WISHED = Running(4711, "python", "python was asked for", ())


def seen(directory: Path, looks: Sequence[Look | None]) -> list[Levels]:
    """The levels before each of these looks but the first, and after the last."""
    inbox = Inbox()
    left = iter(looks)
    found: list[Levels] = []

    def look() -> Look | None:
        found.append(inbox.levels)
        try:
            told = next(left)
        except StopIteration:
            inbox.stop()
            return None
        inbox.poke()  # for the next look to come at once
        return told

    DataPlaneWatch(inbox, look, directory / "tunnel").run()
    return found[1:]


def at_work(running: Running | None, wrong: str = "") -> Look:
    return Look("flannel0", running, 0, {}, wrong, (), SETTINGS)


def test_one_that_stays_down_is_as_old_as_its_first_reason(tmp_path: Path) -> None:
    looks = [at_work(None, "pid 7 was killed by signal 11"), at_work(None, "pid 8 did not answer")]
    first, second = (levels.data_plane_problem for levels in seen(tmp_path, looks))
    assert first is not None
    assert second is not None
    assert (first.reason, second.reason) == ("pid 7 was killed by signal 11", "pid 8 did not answer")
    assert second.since == first.since


def test_who_asked_for_python_is_not_advised_to(tmp_path: Path) -> None:
    down = at_work(None, "pid 7 was killed by signal 11")
    wished = replace(down, settings=replace(SETTINGS, plane="python"))
    advices = [levels.data_plane_problem for levels in seen(tmp_path, [wished])]
    assert [advice and "set Backend.DataPlane to python" in advice.fix for advice in advices] == [False]
    (_, fallen) = seen(tmp_path, [at_work(CRASHED), down])
    assert fallen.data_plane_problem is not None
    assert "set Backend.DataPlane to python" not in fallen.data_plane_problem.fix
    advices = [levels.data_plane_problem for levels in seen(tmp_path, [down])]
    assert [advice and "set Backend.DataPlane to python" in advice.fix for advice in advices] == [True]


@pytest.mark.parametrize(
    ("plane", "running", "told"),
    [
        ("auto", NATIVE, ""),
        ("native", NATIVE, ""),
        ("python", WISHED, ""),
        ("auto", MISSING, ""),
        ("native", MISSING, "set Backend.DataPlane to auto"),
        ("auto", CRASHED, "report it"),
        ("native", CRASHED, "report it"),
    ],
)
def test_python_is_a_problem_where_it_was_not_asked_for(
    tmp_path: Path, plane: Plane, running: Running, told: str
) -> None:
    look = replace(at_work(running), settings=replace(SETTINGS, plane=plane))
    (levels,) = seen(tmp_path, [look])
    problem = levels.fallback_problem
    assert (problem is not None) == bool(told)
    if problem is not None:
        assert problem.code == "data-plane-python"
        assert running.why in problem.reason
        assert told in problem.fix


def test_it_goes_on_while_the_python_pump_is_down_and_ends_with_the_data_plane(tmp_path: Path) -> None:
    looks = [at_work(CRASHED), at_work(None, "pid 9 did not answer"), None]
    kept, still, gone = (levels.fallback_problem for levels in seen(tmp_path, looks))
    assert kept == still is not None
    assert gone is None
