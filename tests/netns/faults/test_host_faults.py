"""What befalls a host below, beside and within the daemon: followed live, no restart, and the subnet stays.

Its interface: test_host_changes.py. What others do to our rows and devices: test_drift.py. SIGKILL at any
write: test_kill_points.py.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.faults.injecting import NETLINK_RECEIVES, NETLINK_SENDS, failing, stopped
from tests.netns.faults.product import on_every_backend
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.observing import events
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import IN_KERNEL, overlay
from tests.netns.test_command_line import CONFIGURATION, run
from tests.netns.test_daemon import ask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.lab import Daemon, Host, Lab
    from tests.netns.faults.rows import Matrix

SAID_ALL = 3.0
"""Seconds without a line in the log."""
LOOKS = 100
"""At the daemon's files, of which some are open for a moment only."""
FLOOD = 10_000
"""Changes of a link at a time, until a netlink socket that nobody reads holds no more."""
# The kernel shows a gateway beside the id of a nexthop, and refuses a delete that names both.
FLUSH_MAIN = (
    "sysctl -qw net.ipv4.nexthop_compat_mode=0; ip route flush table main; ip -6 route flush table main; "
    "sysctl -qw net.ipv4.nexthop_compat_mode=1"
)
FLUSH_OURS = dict.fromkeys(IN_KERNEL, "ip nexthop flush proto 2") | {"udp": "ip route flush proto 96"}
BIND = """
import socket, sys, time
taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
taken.bind(("", int(sys.argv[1])))
print("bound", flush=True)
time.sleep(600)
"""


@contextmanager
def unchanged(*hosts: Host) -> Iterator[None]:
    """The same processes have the same subnets, as containers were told, before and after."""

    def known() -> list[tuple[int, str, bytes]]:
        return [(host.daemon.pid, own_key(host), host.subnet_file.read_bytes()) for host in hosts]

    before = known()
    yield
    assert known() == before


# --- the kernel -----------------------------------------------------------------------------------


@on_every_backend
def test_the_main_table_is_flushed(lab: Lab, backend: str, fault: Matrix) -> None:
    """With the routes of the underlay, which the host's network manager puts back."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    host_own = {
        version: [
            line
            for line in alpha.run(["ip", version, "route", "show", "table", "main"]).splitlines()
            if "proto 96" not in line and "fe80::" not in line
        ]
        for version in ("-4", "-6")
    }
    with (
        unchanged(alpha, beta),
        fault("main table flushed", backend, expected="followed, the subnet stays", check=None) as row,
    ):
        ping = alpha.pod.start_ping(beta.pod.address)
        alpha.run(["sh", "-ec", FLUSH_MAIN])
        for version, lines in host_own.items():
            for line in sorted(lines, key=lambda text: "via" in text):
                alpha.run(["ip", version, "route", "replace", *line.replace("linkdown", "").split()])
        row.cured()
        row.recovered(alpha, beta)
        wait_for(lambda: alpha.pod.ping(beta.pod.address, count=1, wait=0.2).received, 3, "traffic")
        row.loses(ping)
    for version, lines in host_own.items():
        now = alpha.run(["ip", version, "route", "show", "table", "main"]).splitlines()
        assert sorted(line for line in now if "proto 96" not in line and "fe80::" not in line) == sorted(
            lines
        )


def lost_events(host: Host) -> int:
    """After a flood, how often the kernel could not tell somebody of something (/proc/net/netlink, Drops)."""
    host.ip_batch([f"link set eth0 alias a{number % 2}" for number in range(FLOOD)])
    rows = host.run(["cat", "/proc/net/netlink"]).splitlines()[1:]
    return sum(int(row.split()[8]) for row in rows)


@on_every_backend
def test_what_netlink_tells_is_lost(lab: Lab, backend: str, fault: Matrix) -> None:
    """ENOBUFS: among all that happens while the daemon cannot listen is a change of what is ours."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=[*OBSERVED, "-v=1"])
    expected = "everything is looked at again"
    with (
        unchanged(alpha),
        fault("netlink events lost (ENOBUFS)", backend, expected=expected, check=None) as row,
    ):
        with stopped(alpha.daemon):
            alpha.run(FLUSH_OURS[backend].split())
            wait_for(lambda: lost_events(alpha), 60, "events to be lost")
        row.cured()
        row.recovered(alpha)
    assert any(line["overflow"] for line in events(alpha.daemon, "kernel_changed")), "nothing was lost"
    assert alpha.pod.ping(beta.pod.address).lost == 0


@on_every_backend
def test_single_operations_fail(lab: Lab, backend: str, fault: Matrix) -> None:
    """One of three sends to the kernel, and then one of three answers."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    peers = make_peers(lab.etcd, 3)
    expected = "the rest is done, and what failed is tried again"
    for error in ("EBUSY", "EINTR", "EPERM"):
        with (
            unchanged(alpha),
            fault(f"{error} from single operations", backend, expected=expected, check=None) as row,
        ):
            row.stands(alpha, beta)
            for call, change in ((NETLINK_SENDS, {"put": peers}), (NETLINK_RECEIVES, {"gone": peers})):
                with failing(alpha.daemon, f"{call}:error={error}:when=1+3"):
                    change_peers(lab.etcd, backend, **change)
                    wait_in_order(beta, backend, 10)
                row.cured()
                row.recovered(alpha, beta)


TAKEN = {
    "VNI": ("link add foreign type vxlan id 1 dstport 8472 dev eth0", "foreign"),
    "device name": ("link add flannel.1 type bridge", "flannel.1"),
}


@pytest.mark.parametrize("backend", ["vxlan"])
@pytest.mark.parametrize("what", TAKEN)
def test_what_we_need_is_taken_by_somebody_else(lab: Lab, backend: str, what: str, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    command, device = TAKEN[what]
    with (
        unchanged(alpha),
        fault(
            f"{what} taken by somebody else",
            backend,
            expected="theirs is named and left alone",
            check="kernel",
            says=device,
        ) as row,
    ):
        with stopped(alpha.daemon):
            alpha.ip_batch(["link delete flannel.1", command, f"link set {device} up"])
        row.injected()
        row.seen(alpha)
        assert device in [link["ifname"] for link in alpha.ip("link", "show")]
        row.endures(alpha)
        alpha.ip("link", "delete", device)
        row.recovered(alpha, beta)
    assert alpha.pod.ping(beta.pod.address).lost == 0


@pytest.mark.parametrize("backend", ["vxlan"])
def test_the_port_is_taken_by_somebody_else(lab: Lab, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    with (
        unchanged(alpha),
        fault(
            "port taken by somebody else", backend, expected="it is named", check="kernel", says="8472"
        ) as row,
    ):
        with stopped(alpha.daemon):
            alpha.ip("link", "delete", "flannel.1")
            other = alpha.spawn("other", [sys.executable, "-c", BIND, "8472"])
            wait_for(other.output, 5, "the port to be taken", lambda text: "bound" in text)
        row.injected()
        row.seen(alpha)
        alpha.discard(other)
        row.recovered(alpha, beta)
    assert alpha.pod.ping(beta.pod.address).lost == 0


# --- the disk -------------------------------------------------------------------------------------


@on_every_backend
def test_the_disk_is_sick(lab: Lab, backend: str, fault: Matrix) -> None:
    """What stands goes on, peers are followed; what is to be written is, as soon as it can be."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    text = alpha.subnet_file.read_bytes()
    kinds = {"read-only": ("EROFS", "Read-only file system"), "full": ("ENOSPC", "No space left on device")}
    for (disk, (error, says)), peer in zip(kinds.items(), make_peers(lab.etcd, 2), strict=True):
        with fault(
            f"disk {disk}, subnet.env deleted",
            backend,
            expected="peers are followed all the same",
            check="subnet-file",
            says="subnet.env is missing",
            logged=says,
        ) as row:
            row.stands(alpha, beta)
            with failing(alpha.daemon, f"fsync:error={error}", f"rename:error={error}"):
                row.injected()
                alpha.subnet_file.unlink()
                change_peers(lab.etcd, backend, put=[peer])
                row.seen(alpha)
                assert says in str(ask(alpha, "status")["result"]["problems"])
                wait_in_order(alpha, backend)
                row.endures(alpha)
            row.recovered(alpha, beta)
        assert alpha.subnet_file.read_bytes() == text


# --- the process ----------------------------------------------------------------------------------


def lowest_free(daemon: Daemon) -> int:
    """The number that its next file would get, if all that it opens for a moment were closed."""
    folder = Path(f"/proc/{daemon.pid}/fd")
    looks = [{int(file.name) for file in folder.iterdir()} for _ in range(LOOKS)]
    return min(next(number for number in count() if number not in used) for used in looks)


@on_every_backend
def test_file_descriptors_are_exhausted(lab: Lab, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    (peer,) = make_peers(lab.etcd, 1)
    pid = str(alpha.daemon.pid)
    expected = "what stands stays, and what is missed is done later"
    with unchanged(alpha), fault("file descriptors exhausted", backend, expected=expected, check=None) as row:
        row.stands(alpha, beta)
        alpha.run(["prlimit", "--pid", pid, f"--nofile={lowest_free(alpha.daemon)}:"])
        change_peers(lab.etcd, backend, put=[peer])
        alpha.ip("link", "set", "eth0", "alias", "changed")
        wait_in_order(beta, backend)
        log = alpha.daemon.log
        wait_for(lambda: "Too many open files" in log.read_text(), 5, "it to be said")
        wait_for(lambda: time.time() - log.stat().st_mtime > SAID_ALL, 20, "all to be said")
        row.endures(alpha, seconds=8)
        alpha.run(["prlimit", "--pid", pid, "--nofile=1024:"])
        row.recovered(alpha, beta)


@on_every_backend
def test_the_state_directory_is_held_by_another_daemon(lab: Lab, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    second = ["--etcd-prefix=/another/network", f"--subnet-file={alpha.directory}/b/subnet.env"]
    expected = "the second one ends with 78 and names the directory"
    with (
        unchanged(alpha, beta),
        fault("state directory held by another daemon", backend, expected=expected, check=None) as row,
    ):
        row.stands(alpha, beta)
        ended = run(alpha, *alpha.flags, *second)
        assert ended.code == CONFIGURATION
        assert f"--state-dir {alpha.state_directory} is in use by another flanneld-py" in ended.line
        row.recovered(alpha, beta)
