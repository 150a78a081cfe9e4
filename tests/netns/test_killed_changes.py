"""Killed again and again on the way to another Network, the daemon knows what it made in the old one."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.oracle import Rows, actual, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import BACKENDS, config
from tests.netns.test_config_changes import change
from tests.netns.test_kill_points import Scene

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

WRITES = (0, 1, 2, 0)
"""After which the daemon dies, one start after the other; the first ones come before the deletes."""


def rows_of_old(host: Host, backend: str) -> Rows:
    return {what: how for what, how in actual(host, backend).items() if "10.5." in what}


@pytest.fixture(params=BACKENDS)
def scene(request: pytest.FixtureRequest, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A host with two peers in the old Network, whose daemon has died before and amid the change."""
    backend: str = request.param
    lab.etcd.put_config(config(backend))
    host = lab.add_host("alpha")
    host.start_daemon().wait_ready()
    peers = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, backend, put=peers)
    wait_in_order(host, backend)
    host.daemon.kill()
    change(lab, backend, Network="10.6.0.0/16")
    made = Scene(host, backend, peers, monkeypatch)
    for writes in WRITES:
        assert made.start_dying(writes).wait_exit() == -signal.SIGKILL
        # The subnet file is the first that would forget.
        (host.run_directory / "subnet.env").unlink(missing_ok=True)
    assert rows_of_old(host, backend), "there is nothing left to clean up"
    return made


def test_the_next_start_removes_what_was_in_the_old_network(scene: Scene) -> None:
    host, backend = scene.host, scene.backend
    host.start_daemon().wait_ready()
    wait_for(lambda: rows_of_old(host, backend), 5, "no row of the old Network", lambda rows: not rows)


def test_so_does_a_cleanup(scene: Scene) -> None:
    host = scene.host
    done = scene.ctl("flanneld_py.cli.ctl.main")
    assert done.wait(0) == 0, done.output()
    assert actual(host, scene.backend) == {}
