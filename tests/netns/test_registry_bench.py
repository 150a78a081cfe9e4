"""`flannelctl bench registry` shows what real daemons would do, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import wait_status
from tests.netns.scenes import config

if TYPE_CHECKING:
    from flanneld_py.lab import Lab

FLANNELCTL = (sys.executable, "-m", "flanneld_py.cli.ctl.main")


def simulated(lab: Lab, nodes: int, watches: int) -> dict[str, dict[str, Any]]:
    """The steps by name."""
    steps = json.loads(lab.underlay.run(command(lab, nodes, watches), timeout=240))
    return {step["name"]: step for step in steps}


def command(lab: Lab, nodes: int, watches: int) -> list[str]:
    where = [f"--etcd-endpoints={lab.etcd.endpoint}", f"--etcd-prefix={lab.etcd.prefix}"]
    return [*FLANNELCTL, *where, "bench", "registry", f"--nodes={nodes}", f"--watches={watches}", "--json"]


def leases(lab: Lab) -> set[str]:
    """That etcd has now; those of tests before this one end as they please."""
    return set(lab.etcd.ctl("lease", "list").splitlines()[1:])


def real(lab: Lab) -> dict[str, dict[str, int]]:
    """The same steps of one daemon: messages that etcd received, by method."""
    lab.etcd.put_config(config("vxlan"))
    (alpha,) = lab.add_hosts("alpha")
    steps = {}
    for name in ("join", "start again"):
        before = lab.etcd.requests()
        daemon = alpha.start_daemon()
        wait_status(daemon, "in sync", lambda status: bool(status["state"] == "in sync"), 20)
        steps[name] = dict(lab.etcd.requests() - before)
        assert daemon.terminate() == 0
    return steps


def test_one_node_costs_what_a_daemon_costs(lab: Lab) -> None:
    steps, wanted = simulated(lab, 1, 1), real(lab)
    assert {name: step["received"] for name, step in steps.items()} == wanted
    assert sum(wanted["join"].values()) <= 8


def test_nodes_that_start_again_write_nothing_and_wake_nobody(lab: Lab) -> None:
    steps = simulated(lab, 40, 15)
    assert steps["join"]["writes"] == 40
    assert steps["join"]["events"] >= 15 * (40 - 15), "each watch brings the joins that come after its own"
    assert steps["start again"]["writes"] == 0
    assert steps["start again"]["events"] == 0
    assert steps["start again"]["calls"] == {"Range": 40, "LeaseKeepAlive": 40}


def test_nothing_is_left_in_etcd(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    before = lab.etcd.ctl("get", "--prefix", "/")
    known = leases(lab)
    simulated(lab, 5, 2)
    assert lab.etcd.ctl("get", "--prefix", "/") == before
    assert leases(lab) <= known


@pytest.mark.parametrize("later", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(lab: Lab, number: signal.Signals, later: float) -> None:
    """By this and another one, at several moments."""
    known = leases(lab)
    running = lab.underlay.spawn("bench", command(lab, 60, 30))
    place = f"{lab.etcd.prefix}-flanneld-py-bench-"
    wait_for(lambda: lab.etcd.ctl("get", "--prefix", place), 10, "it to begin")
    time.sleep(later)
    running.send_signal(number)
    running.send_signal(number)
    assert running.wait(60) == 130
    assert running.stdout.read_text() == ""
    assert running.stderr.read_text() == "flannelctl: interrupted; nothing is left in etcd\n"
    assert lab.etcd.ctl("get", "--prefix", place) == ""
    assert leases(lab) <= known
