"""Killed again and again on the way to another Network, the daemon knows what it made in the old one."""

from __future__ import annotations

import json
import signal
from functools import partial
from operator import eq
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.oracle import Rows, actual, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import BACKENDS, config
from tests.netns.test_config_changes import apply, change, vxlan_devices
from tests.netns.test_kill_points import Scene

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

WRITES = (0, 1, 2, 0)
"""After which the daemon dies, one start after the other; the first ones come before the deletes."""


def rows_of(host: Host, backend: str, network: str) -> Rows:
    return {what: how for what, how in actual(host, backend).items() if network in what}


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
    assert rows_of(host, backend, "10.5."), "there is nothing left to clean up"
    return made


def test_the_next_start_removes_what_was_in_the_old_network(scene: Scene) -> None:
    host, backend = scene.host, scene.backend
    host.start_daemon().wait_ready()
    wait_for(lambda: rows_of(host, backend, "10.5."), 5, "no row of the old Network", lambda rows: not rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_that_became_wider_is_known_to_the_next_start(lab: Lab, backend: str) -> None:
    """The lease stays, so nothing about it is saved again; yet rows are made where it says nothing of."""
    lab.etcd.put_config(config(backend))
    host = lab.add_host("alpha")
    host.start_daemon().wait_ready()
    change(lab, backend, Network="10.4.0.0/15")
    apply(host)
    (peer,) = make_peers(lab.etcd, 1)
    # Not Go flannel's: for its sake the lease would be written, and the state file with it.
    record = peer.record(backend) | {"NodeID": "another"}
    lab.etcd.ctl("put", f"{host.prefix}/subnets/10.4.7.0-24", "--", json.dumps(record))
    wait_in_order(host, backend)
    host.daemon.kill()
    (host.run_directory / "subnet.env").unlink()
    change(lab, backend, Network="10.6.0.0/16")
    host.start_daemon().wait_ready()
    wait_for(lambda: rows_of(host, backend, "10.4."), 5, "no row of the old Network", lambda rows: not rows)


def test_so_does_a_cleanup(scene: Scene) -> None:
    host = scene.host
    done = scene.ctl("flanneld_py.cli.ctl.main")
    assert done.wait(0) == 0, done.output()
    assert actual(host, scene.backend) == {}


def test_killed_while_one_device_takes_the_place_of_another_the_next_start_ends_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is made under another name first."""
    lab.etcd.put_config(config("vxlan"))
    host = lab.add_host("alpha")
    host.start_daemon().wait_ready()
    peers = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, "vxlan", put=peers)
    wait_in_order(host, "vxlan")
    host.daemon.kill()
    made = Scene(host, "vxlan", peers, monkeypatch)
    for writes, port in ((1, 4789), (2, 4790), (3, 4789), (1, 8472)):
        change(lab, options={"Port": port})
        assert made.start_dying(writes).wait_exit() == -signal.SIGKILL
        host.start_daemon().wait_ready()
        one_device = partial(eq, {"flannel.1": (1, port)})
        wait_for(partial(vxlan_devices, host), 5, "one device", one_device)
        host.daemon.kill()
    host.start_daemon().wait_ready()
    wait_in_order(host, "vxlan")
