"""Killed between any two writes, the next start or the next cleanup finishes the work."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import wait_in_sync
from tests.netns.oracle import Rows, actual, differences, expected, own_key, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.scenes import BACKENDS, NETWORK, config

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Daemon, Host, Lab
    from flanneld_py.lab.process import Process
    from tests.netns.faults.rows import Matrix, Trial

ROOT = Path(__file__).parents[2]
MTU = {"host-gw": 1500, "udp": 1472, "vxlan": 1450}
PEER = ("set fdb, neighs, nexthops", "set routes")
"""Three rows in one send; the kernel works through it before anything can end the daemon."""
PATH = ("set nexthops", "set routes")
DEVICE = ("set links", "set links", "set sysctls", "set addrs")
"""Made and marked in one send, taken up in the next; a TUN is marked and taken up, then made to stay."""
FILE = ("fsync", "fsync", "set files")
"""Its new text is safe; it stands in the old one's place; done."""
OWN_FILES = (
    "remove flanneld-py.sock",
    "remove status.json",
    "remove registry",
    "remove state.json",
    "remove lock",
    "remove run/",
    "remove state/",
)

OWN_FILES_UDP = (*OWN_FILES[:3], "remove tunnel", *OWN_FILES[3:])

WRITES: dict[str, dict[str, tuple[str, ...]]] = {
    "host-gw": {
        "first start": (*PATH, *FILE),
        "peer joins": PATH,
        "peer leaves": ("del routes", "del nexthops"),
        "peer moves": (*PATH, "del nexthops"),
        "cleanup": ("del files", "del routes", "del nexthops", *OWN_FILES),
    },
    "udp": {
        "first start": (*DEVICE, "set pumps", "set tunnel", "set routes", *FILE),
        "peer joins": ("set tunnel",),
        "peer leaves": ("del tunnel",),
        "peer moves": ("set tunnel",),
        "cleanup": ("del files", "del links", *OWN_FILES_UDP),
    },
    "vxlan": {
        "first start": (*DEVICE, *PEER, *FILE),
        "peer joins": PEER,
        "peer leaves": ("del routes", "del nexthops", "del neighs", "del fdb"),
        "peer moves": ("set fdb, neighs", "del fdb"),
        "cleanup": ("del files", "del links", *OWN_FILES),
    },
}
"""The writes of each event, in order: it is cut short before the first and after each."""
LEAST_POINTS = 30


@dataclass(frozen=True, slots=True)
class Scene:
    """One host, whose peers exist in etcd only."""

    host: Host
    backend: str
    peers: list[Peer]
    monkeypatch: pytest.MonkeyPatch

    def start(self) -> None:
        """Start the daemon; it sees to it that all is well."""
        self.host.start_daemon().wait_ready()
        wait_in_order(self.host, self.backend, 5)
        if self.backend == "udp":
            wait_for((self.host.state_directory / "tunnel").exists, 5, "what the next process begins with")
        assert self.host.subnet_env() == {
            "FLANNEL_NETWORK": NETWORK,
            "FLANNEL_SUBNET": subnet_of(own_key(self.host)).replace(".0/", ".1/"),
            "FLANNEL_MTU": str(MTU[self.backend]),
            "FLANNEL_IPMASQ": "false",
        }

    def start_dying(self, writes: int) -> Daemon:
        command = (sys.executable, "-m", "tests.netns.die_at", str(writes), "daemon")
        with self.monkeypatch.context() as patched:
            patched.setattr("flanneld_py.lab.daemon.COMMAND", command)
            patched.chdir(ROOT)
            return self.host.start_daemon()

    def cut_short(self, event: str, writes: int) -> None:
        """A daemon that dies after so many writes, and the one after it; or one that has fewer to do."""
        expected_writes = WRITES[self.backend][event]
        want, before = expected(self.host, self.backend), actual(self.host, self.backend)
        daemon = self.start_dying(writes)
        dies = writes <= len(expected_writes)
        if not dies:
            wait_in_sync(daemon)
            assert differences(self.host, self.backend) == []
            daemon.kill()
        assert daemon.wait_exit() == -signal.SIGKILL, f"{event}: not dead after {writes} writes"
        assert written(daemon.log_text()) == list(expected_writes[:writes])
        have = actual(self.host, self.backend)
        assert black_holes(have) == []
        assert [row for row in want if want[row] == before.get(row) != have.get(row)] == []
        if dies:
            self.start()
            self.host.daemon.kill()

    def ctl(self, *command: str) -> Process:
        """Run `flannelctl cleanup`, or a program that stands for it, to its end."""
        flags = [flag for flag in self.host.flags if not flag.startswith(("--node-id", "--iface"))]
        cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(ROOT / "build" / "pycache")}
        with self.monkeypatch.context() as patched:
            patched.chdir(ROOT)
            argv = [sys.executable, "-m", *command, *flags, "cleanup"]
            process = self.host.spawn("ctl", argv, env={**cache, "FLANNELD_ENV_FILE": os.devnull})
        process.wait(10)
        return process


@pytest.fixture(params=BACKENDS)
def scene(request: pytest.FixtureRequest, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A host with two peers; no daemon has run on it yet. A third peer is known, but not in etcd."""
    backend: str = request.param
    # The daemon must not lease what the third one is going to have.
    lab.etcd.put_config(config(backend, SubnetMin="10.5.100.0"))
    peers = make_peers(lab.etcd, 3)
    change_peers(lab.etcd, backend, put=peers[:2])
    host = lab.add_host("alpha")
    if backend == "udp":
        host.keep_descriptors()
    return Scene(host, backend, peers, monkeypatch)


def written(text: str) -> list[str]:
    """What die_at says that it wrote."""
    return [line.removeprefix("wrote: ") for line in text.splitlines() if line.startswith("wrote: ")]


def black_holes(rows: Rows) -> list[str]:
    """Routes into a vxlan device whose neighbour or FDB entry is missing."""
    gateways = {
        row: how.split()[1]
        for row, how in rows.items()
        if row.startswith("route") and how.startswith("via") and "flannel" in how
    }
    return [row for row, via in gateways.items() if f"fdb {rows.get(f'neigh {via}')}" not in rows]


def points(backend: str, *events: str) -> int:
    """Before the first write and after each."""
    return sum(len(WRITES[backend][event]) + 1 for event in events)


def killed(fault: Matrix, scene: Scene, event: str) -> Trial:
    """A row of the table of faults."""
    expected = "the next start finishes the work"
    return fault(f"SIGKILL at any write: {event}", scene.backend, expected=expected, check=None)


def test_first_start(scene: Scene, fault: Matrix) -> None:
    host = scene.host
    with killed(fault, scene, "first start"):
        for writes in range(points(scene.backend, "first start") + 1):
            wipe(host)
            if writes == 0:
                # For once: what a lease claimed and a process killed before its first write leave behind.
                scene.start_dying(0).wait_exit()
            scene.cut_short("first start", writes)


def wipe(host: Host) -> None:
    """As after a reinstallation: nothing in the kernel, no files."""
    for link in host.ip("link", "show"):
        if link["ifname"] in ("flannel.1", "flannel0"):
            host.ip("link", "delete", link["ifname"])
    if host.manager is not host.notify:
        host.drop_descriptors()
        host.keep_descriptors()
    host.run(["ip", "nexthop", "flush", "proto", "2"])
    for directory in (host.run_directory, host.state_directory):
        shutil.rmtree(directory, ignore_errors=True)


def test_peer_joins_and_leaves(scene: Scene, fault: Matrix) -> None:
    scene.start()
    scene.host.daemon.kill()
    with killed(fault, scene, "peer joins, and leaves"):
        for writes in range(points(scene.backend, "peer joins") + 1):
            for event, change in (("peer joins", "put"), ("peer leaves", "gone")):
                change_peers(scene.host.etcd, scene.backend, **{change: scene.peers[2:]})
                scene.cut_short(event, writes)


def test_peer_moves(scene: Scene, fault: Matrix) -> None:
    """To another MAC or, with host-gw, to another address."""
    first = scene.peers[0]
    moved = replace(
        first,
        **{"mac": "02:00:05:00:00:99"} if scene.backend == "vxlan" else {"public": "192.0.2.199"},
    )
    scene.start()
    scene.host.daemon.kill()
    with killed(fault, scene, "peer moves"):
        for writes in range(points(scene.backend, "peer moves") + 1):
            change_peers(scene.host.etcd, scene.backend, put=[first if writes % 2 else moved])
            scene.cut_short("peer moves", writes)


def test_cleanup(scene: Scene) -> None:
    host, expected_writes = scene.host, WRITES[scene.backend]["cleanup"]
    for writes in range(points(scene.backend, "cleanup") + 1):
        scene.start()
        wait_for((host.state_directory / "registry").exists, 5, "the state to be complete")
        host.daemon.kill()
        cut = scene.ctl("tests.netns.die_at", str(writes), "ctl")
        dies = writes <= len(expected_writes)
        assert cut.wait(0) == (-signal.SIGKILL if dies else 0), cut.output()
        assert written(cut.output()) == list(expected_writes[:writes])

        again = scene.ctl("flanneld_py.cli.ctl.main")
        assert again.wait(0) == 0, again.output()
        assert actual(host, scene.backend) == {}
        assert [link["ifname"] for link in host.ip("link", "show")] == ["lo", "eth0"]
        assert host.ip("route", "show", "table", "all", "proto", "96") == []
        assert not host.run_directory.exists() or list(host.run_directory.iterdir()) == []
        assert not host.state_directory.exists() or list(host.state_directory.iterdir()) == []


def test_there_are_many_points(figure: Callable[[str], None]) -> None:
    table = {(backend, event): points(backend, event) for backend in WRITES for event in WRITES[backend]}
    figure(f"killed with SIGKILL at {sum(table.values())} points: before, between and after the writes of")
    for (backend, event), count in table.items():
        figure(f"  {backend:<8} {event:<12} {count:>3}")
    assert sum(table.values()) >= LEAST_POINTS
