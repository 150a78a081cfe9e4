"""Pumps without daemons: every byte arrives, whatever is at the other end and whatever the kernel refuses."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from flanneld_py.lab import Transfer, wait_for
from flanneld_py.lab.entering import inside
from flanneld_py.udp import pump
from flanneld_py.udp.pump import ANSWER_WITHIN, CRASHES, WORKER, Pump, PumpDown, open_socket
from flanneld_py.udp.table import Peer, SourceCheck
from tests.netns.plain_udp_peer import PlainPeer
from tests.netns.udp_ends import DEVICE, MTU, PORT, End, as_peer
from tests.netns.udp_packets import DF, IPV4_IN, MF, ipv4
from tests.netns.udp_traffic import IcmpErrors, exchange, send_raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Host, Lab
    from flanneld_py.udp.pump import Plane, Running

    MakeEnd = Callable[..., End]

PLANES: tuple[Plane, ...] = ("native", "python")
SO_NO_CHECK, PIDFD_GETFD = 11, 438
SWAPPED = {"native": 300, "python": 20}
BUSY = {"native": 128 << 20, "python": 8 << 20}
"""Bytes in a second, so that most swaps meet a batch."""
REPLACED = 25
"""Workers in a row; a packet is in flight at the end of few of them."""
OFFLOADS = ("tso", "uso", "udp_segment", "udp_gro")
AGAIN = 15.0
"""Seconds, in the place of an hour."""


@pytest.fixture
def make_end(lab: Lab) -> Iterator[MakeEnd]:
    """Makes hosts with a pump; they end with the test."""
    assert lab.etcd
    with ExitStack() as stack:

        def make(host: Host, plane: Plane = "native", *off: str, **more: object) -> End:
            end = End(host, plane, off, **more)  # type: ignore[arg-type]
            stack.callback(end.close)
            return end

        yield make


def join(*ends: End) -> None:
    """Every one knows all others."""
    for end in ends:
        others = [as_peer(other.host, ipv6=other.ipv6) for other in ends if other is not end]
        end.pump.set_table(end.table(others))


def pair(lab: Lab, make_end: MakeEnd, planes: tuple[Plane, Plane], *off: str) -> tuple[End, End]:
    hosts = lab.add_hosts("a", "b")
    a, b = (make_end(host, plane, *off, ipv6=True) for host, plane in zip(hosts, planes, strict=True))
    join(a, b)
    return a, b


# --- interoperation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "planes", [("native", "native"), ("native", "python"), ("python", "python")], ids="-".join
)
def test_every_byte_arrives(lab: Lab, make_end: MakeEnd, planes: tuple[Plane, Plane]) -> None:
    a, b = pair(lab, make_end, planes)
    exchange(a.host, b.host)
    for end in (a, b):
        counters = end.pump.counters()
        assert counters["send.super-packets"] > 0
        assert counters["receive.super-packets"] > 0
        assert end.drops().keys() <= {"send.no-route"}  # the kernel's own IPv6 multicast


@pytest.mark.parametrize("plane", PLANES)
def test_a_peer_of_one_packet_a_datagram(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    ours, theirs = lab.add_hosts("a", "plain")
    end = make_end(ours, plane)
    end.pump.set_table(end.table([as_peer(theirs)]))
    peer = PlainPeer(theirs, {f"10.5.{ours.number}.0/24": ours.address})
    try:
        exchange(ours, theirs, 1 << 20)
    finally:
        peer.close()
    assert peer.wrong == []
    assert peer.longest == MTU


@pytest.mark.parametrize("off", OFFLOADS)
@pytest.mark.parametrize("plane", PLANES)
def test_each_offload_forced_off(lab: Lab, make_end: MakeEnd, plane: Plane, off: str) -> None:
    a, b = pair(lab, make_end, (plane, plane), off)
    assert off not in a.running.offloads
    assert len(a.running.offloads) == len(OFFLOADS) - 1
    exchange(a.host, b.host, 1 << 20)


def test_none_of_the_offloads(lab: Lab, make_end: MakeEnd) -> None:
    a, b = pair(lab, make_end, ("native", "python"), *OFFLOADS)
    exchange(a.host, b.host, 1 << 20)
    assert a.pump.counters()["receive.super-packets"] == 0


def without_checksums(end: End) -> None:
    """All sockets that the worker sends by."""
    libc = ctypes.CDLL(None, use_errno=True)
    pid = end.running.pid
    worker = os.pidfd_open(pid)
    for number in map(int, os.listdir(f"/proc/{pid}/fd")):  # noqa: PTH208 - names are enough
        fd = libc.syscall(PIDFD_GETFD, worker, number, 0)
        with contextlib.suppress(OSError), socket.socket(fileno=fd) as udp:  # not all are sockets
            if udp.type == socket.SOCK_DGRAM:
                udp.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
    os.close(worker)


@pytest.mark.parametrize("plane", PLANES)
def test_a_kernel_that_refuses_udp_segment(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    """The same batch goes again, packet by packet. EINVAL without outer checksums (net/ipv4/udp.c)."""
    a, b = pair(lab, make_end, (plane, plane))
    without_checksums(a)
    exchange(a.host, b.host, 1 << 20)
    counters = a.pump.counters()
    assert 0 < counters["send.offload-refused"] < 10  # not tried again and again
    assert "send.send-failed" not in a.drops()


@pytest.mark.parametrize("plane", PLANES)
def test_ipv6_inside(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, b = (make_end(host, plane, ipv6=True) for host in lab.add_hosts("a", "b"))
    join(a, b)
    target = str(b.host.pod.addresses[1])
    assert Transfer(a.host.pod, b.host.pod, target, 4 << 20).finish() == 4 << 20
    assert a.host.pod.ping(target, 5, size=MTU).lost == 0
    assert a.pump.counters()["send.super-packets"] > 0
    a.pump.set_table(a.table([replace(as_peer(b.host, ipv6=True), ipv6=False)]))
    assert a.host.pod.ping(target, 2, wait=0.2).received == 0
    assert a.drops()["send.ipv6-not-agreed"] >= 2
    assert a.host.pod.ping(b.host.pod.address, 2).lost == 0


# --- one hop, and its ICMP ------------------------------------------------------------------------


@pytest.mark.parametrize("plane", PLANES)
def test_icmp_errors(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, b = pair(lab, make_end, (plane, plane))
    errors = IcmpErrors(a.host.pod)
    tun = f"10.5.{a.host.number}.0"
    try:
        probe = ipv4(a.host.pod.address, b.host.pod.address, ttl=2)  # the host takes one, we the other
        send_raw(a.host.pod, probe, b.host.pod.address)
        source, kind, code, _, quoted = errors.next()
        assert (source, kind, code) == (tun, 11, 0)
        assert quoted[12:] == probe[12:]
        send_raw(a.host.pod, ipv4(a.host.pod.address, "10.5.250.1"), "10.5.250.1")
        assert errors.next()[:3] == (tun, 3, 0)
    finally:
        errors.close()
    assert {name: a.drops()[name] for name in ("send.ttl-exceeded", "send.no-route")}[
        "send.ttl-exceeded"
    ] == 1


@pytest.mark.parametrize("plane", PLANES)
def test_a_path_narrower_than_the_mtu(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, b = pair(lab, make_end, (plane, plane))
    a.host.ip("route", "add", b.host.address, "dev", "eth0", "mtu", "1300")
    narrow = 1300 - 28
    errors = IcmpErrors(a.host.pod)
    try:
        send_raw(
            a.host.pod,
            ipv4(a.host.pod.address, b.host.pod.address, bytes(1400), field=DF),
            b.host.pod.address,
        )
        assert errors.next()[1:4] == (3, 4, narrow)
    finally:
        errors.close()
    may_fragment = ["ping", "-M", "dont", "-c", "3", "-i", "0.01", "-s", str(MTU - 28), b.host.pod.address]
    assert "3 received" in a.host.pod.run(may_fragment)
    assert a.pump.counters()["send.fragmented"] >= 1
    size = 2 << 20
    assert Transfer(a.host.pod, b.host.pod, b.host.pod.address, size).finish() == size


# --- packets made to do harm ----------------------------------------------------------------------


def crafted(a: Host, b: Host) -> list[tuple[str, bytes]]:
    """What `b` sends to `a`, and the reason to drop it."""
    source, target = b.pod.address, a.pod.address
    good = ipv4(source, target, b"x" * 80)
    six = struct.pack(">IHBB", 6 << 28, 8, 0, 64) + bytes(32) + bytes(8)
    return [
        ("too-short", b""),
        ("too-short", good[:19]),
        ("too-short", six[:30]),
        ("version", b"\x55" + good[1:]),
        ("version", b"\x05" + good[1:]),
        ("header-length", b"\x44" + good[1:]),
        ("header-length", b"\x4f" + good[1:40]),
        ("total-length", good[:-1]),
        ("total-length", good + b"\0"),
        ("total-length", six + b"\0"),
        ("header-checksum", good[:11] + bytes([good[11] ^ 1]) + good[12:]),
        ("ttl-zero", ipv4(source, target, ttl=0)),
        ("inner-destination", ipv4(source, f"10.5.{b.number}.9")),
        ("inner-destination", ipv4(source, "10.5.250.1")),
        ("inner-destination", ipv4(source, a.address)),
        ("inner-destination", ipv4(source, "255.255.255.255")),
        ("inner-destination", six),
        ("inner-source", ipv4("10.5.250.1", target)),
        ("inner-source", ipv4(f"10.5.{a.number}.9", target)),
    ]


@pytest.mark.parametrize("plane", PLANES)
def test_crafted_datagrams_are_counted(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    hosts = lab.add_hosts("a", "b", "stranger")
    end = make_end(hosts[0], plane)
    end.pump.set_table(end.table([as_peer(hosts[1])]))
    for host in hosts[1:]:
        host.subnet_file.write_text(f"FLANNEL_SUBNET=10.5.{host.number}.1/24\nFLANNEL_MTU={MTU}\n")
        host.attach_pods()
    with inside(hosts[1]):
        peer = open_socket(hosts[1].address, PORT)
    with inside(hosts[2]):
        stranger = open_socket(hosts[2].address, PORT)
    with peer, stranger:
        expected: dict[str, int] = {}
        for reason, datagram in crafted(*hosts[:2]):
            peer.sendto(datagram, (hosts[0].address, PORT))
            expected[f"receive.{reason}"] = expected.get(f"receive.{reason}", 0) + 1
        good = ipv4(hosts[1].pod.address, hosts[0].pod.address, b"x" * 40)
        stranger.sendto(good, (hosts[0].address, PORT))
        expected["receive.outer-source-unknown"] = 1
        for allowed in (
            good,
            ipv4("203.0.113.5", hosts[0].pod.address),  # outside the Network: not masqueraded, but legitimate
            ipv4(hosts[1].pod.address, hosts[0].pod.address, b"x" * 40, field=MF),  # a first fragment
            ipv4(hosts[1].pod.address, hosts[0].pod.address, b"x" * 40, field=0x10),  # a later one
            ipv4(
                hosts[1].pod.address, hosts[0].pod.address, good, protocol=IPV4_IN
            ),  # IP-in-IP is the pod's affair
        ):
            peer.sendto(allowed, (hosts[0].address, PORT))
        wait_for(lambda: end.pump.counters()["receive.packets"], 5, "the good ones", lambda seen: seen == 5)
        found = {name: number for name, number in end.drops().items() if name.startswith("receive.")}
        assert found == expected
        end.pump.set_table(end.table([as_peer(hosts[1])], SourceCheck.STRICT))
        peer.sendto(ipv4("203.0.113.5", hosts[0].pod.address), (hosts[0].address, PORT))
        wait_for(lambda: end.drops()["receive.inner-source"], 5, "the strict check", lambda seen: seen == 3)
        end.pump.set_table(end.table([as_peer(hosts[1])], SourceCheck.FALSE))
        peer.sendto(ipv4("10.5.250.1", hosts[0].pod.address), (hosts[0].address, PORT))
        wait_for(lambda: end.pump.counters()["receive.packets"], 5, "no check", lambda seen: seen == 6)


@pytest.mark.parametrize("plane", PLANES)
def test_a_flood_from_a_stranger(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    """Counters are answered at once, and peers still get through."""
    a, b = pair(lab, make_end, (plane, plane))
    stranger = lab.add_host("stranger")
    with inside(stranger):
        source = open_socket(stranger.address, PORT)
    packet = ipv4(b.host.pod.address, a.host.pod.address, bytes(44))

    def counted() -> int:
        return a.drops().get("receive.outer-source-unknown", 0)

    with source:
        source.sendto(packet, (a.host.address, PORT))
        wait_for(counted, 5, "the first one")
        end = time.monotonic() + 1
        while time.monotonic() < end:
            for _ in range(500):
                source.sendto(packet, (a.host.address, PORT))
        started = time.monotonic()
        assert counted() > 1000
        assert time.monotonic() - started < 1
    pod, other = a.host.pod, b.host.pod.address
    wait_for(lambda: pod.ping(other, 1, wait=1).lost, 2, "no loss behind it", lambda lost: lost == 0)
    assert pod.ping(other, 3, wait=3).lost == 0


# --- tables ---------------------------------------------------------------------------------------


def many(end: End, other: Host, first: int) -> bytes:
    """A table of 10,000 peers, and `other`."""
    peers = [as_peer(other)]
    for number in range(10_000):
        net = IPv4Network((int(IPv4Address("10.64.0.0")) + 256 * number, 24))
        peers.append(Peer(IPv4Address(int(IPv4Address("172.16.0.0")) + first + number), (net,)))
    return end.table(peers)


@pytest.mark.parametrize("plane", PLANES)
def test_large_tables_replaced_while_forwarding(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, b = pair(lab, make_end, (plane, plane))
    tables = [many(a, b.host, first) for first in (1, 5)]
    size = BUSY[plane]
    pings = a.host.pod.start_ping(b.host.pod.address, 0.002)
    transfer = Transfer(a.host.pod, b.host.pod, b.host.pod.address, size, seconds=1)
    for turn in range(SWAPPED[plane]):
        a.pump.set_table(tables[turn % 2])
    assert transfer.finish() == size
    assert pings.stop().lost == ()


@pytest.mark.parametrize("plane", PLANES)
def test_a_wrong_table_changes_nothing(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, b = pair(lab, make_end, (plane, plane))
    good = a.table([as_peer(b.host)])
    for wrong in (b"", b"FPT1", good[:-1], good + b"\0", b"FPT2" + good[4:], b"FPT1" + bytes(100)):
        with pytest.raises(ValueError, match=r"."):
            a.pump.set_table(wrong)
    assert a.host.pod.ping(b.host.pod.address, 2).lost == 0
    assert a.start().plane == plane
    assert a.host.pod.ping(b.host.pod.address, 2).lost == 0


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [("native", "native"), ("python", "python")], ids="-".join)
def test_a_replaced_worker_loses_nothing(lab: Lab, make_end: MakeEnd, planes: tuple[Plane, Plane]) -> None:
    a, b = pair(lab, make_end, planes)
    pings = a.host.pod.start_ping(b.host.pod.address, 0.001)
    before = a.pump.counters()["send.packets"]
    pids = {a.start().pid for _ in range(REPLACED)}
    wait_for(lambda: a.pump.counters()["send.packets"], 5, "packets", lambda seen: seen > before + 20)
    assert pings.stop().lost == ()
    assert len(pids) == REPLACED
    assert not any(
        Path(f"/proc/{pid}").exists() for pid in pids - {a.pump.running.pid if a.pump.running else 0}
    )


@pytest.mark.parametrize("plane", PLANES)
def test_a_killed_worker_is_replaced(
    lab: Lab, make_end: MakeEnd, plane: Plane, figure: Callable[[str], None]
) -> None:
    a, b = pair(lab, make_end, (plane, plane))
    assert a.tend() is None
    pings = a.host.pod.start_ping(b.host.pod.address, 0.002)
    wait_for(pings.answered, 5, "pings")
    os.kill(a.running.pid, signal.SIGKILL)
    wrong = wait_for(a.tend, 5, "the end to be noticed")
    assert "was killed by signal 9" in str(wrong)
    assert a.pump.restarts == 1
    answered = pings.answered()
    wait_for(pings.answered, 5, "pings by the new one", lambda seen: seen > answered + 20)
    loss = pings.stop()
    gap = loss.longest_gap * 1000
    figure(f"udp {plane}, worker killed: {len(loss.lost)} of {loss.sent} packets lost, {gap:.0f} ms without")
    assert loss.longest_gap < 1
    assert len(loss.lost) < 20


@pytest.mark.parametrize("plane", PLANES)
def test_a_stopped_worker_is_replaced(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, b = pair(lab, make_end, (plane, plane))
    os.kill(a.running.pid, signal.SIGSTOP)
    started = time.monotonic()
    assert "did not answer within" in str(a.tend())
    assert time.monotonic() - started < 2 * ANSWER_WITHIN
    assert a.host.pod.ping(b.host.pod.address, 2, wait=2).lost == 0
    with pytest.raises(ProcessLookupError):
        os.kill(a.running.pid, 0)


def test_a_stopped_receiver_of_the_python_pump_is_noticed(lab: Lab, make_end: MakeEnd) -> None:
    a, b = pair(lab, make_end, ("python", "python"))
    (child,) = (int(pid) for pid in children(a.running.pid))
    os.kill(child, signal.SIGSTOP)
    a.tend()
    wrong = wait_for(a.tend, 6, "the receiver's silence", interval=0.2)
    assert "hangs in receive" in str(wrong)
    assert a.host.pod.ping(b.host.pod.address, 2, wait=2).lost == 0
    wait_for(lambda: Path(f"/proc/{child}").exists(), 2, "its end", lambda there: not there)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_auto_gives_up_on_a_native_pump_that_crashes_and_tries_it_again_later(
    lab: Lab, make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "NATIVE_AGAIN", AGAIN)
    a, b = pair(lab, make_end, ("auto", "native"))

    def tended() -> Running | None:
        with contextlib.suppress(PumpDown):  # it is not time yet
            a.tend()
        return a.pump.running

    for _ in range(CRASHES):
        running = wait_for(tended, 10, "a worker")
        assert running is not None
        assert running.plane == "native"
        last = running.pid
        os.kill(last, signal.SIGSEGV)
        wait_for(lambda gone=running: tended() != gone, 5, "its end to be noticed")  # type: ignore[misc]
    running = wait_for(tended, 10, "the other pump")
    assert running is not None
    assert running.plane == "python"
    assert (
        running.why
        == f"native ended {CRASHES} times within a minute, last: pid {last} was killed by signal 11"
    )
    assert a.host.pod.ping(b.host.pod.address, 2, wait=2).lost == 0
    pings = a.host.pod.start_ping(b.host.pod.address, 0.002)
    again = wait_for(tended, 2 * AGAIN, "the native one again", lambda found: found != running)
    assert again is not None
    assert (again.plane, again.why) == ("native", "")
    assert pings.stop().lost == ()


@pytest.mark.parametrize("plane", PLANES)
def test_a_deleted_device(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, _ = pair(lab, make_end, (plane, plane))
    a.host.ip("link", "delete", DEVICE)

    def complaint() -> str:
        try:
            return str(a.tend())
        except PumpDown as down:
            return str(down)

    assert "TUN" in wait_for(complaint, 5, "the device to be missed", lambda said: said != "None")


@pytest.mark.parametrize("plane", PLANES)
def test_no_worker_outlives_the_daemon(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    """Its end of the socket is all that a killed daemon can close."""
    end = make_end(lab.add_host("a"), plane)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = (end.tun, end.udp.fileno(), its.fileno())
    argv = [sys.executable, "-I", "-S", str(WORKER), plane, *map(str, fds), ""]
    worker = subprocess.Popen(argv, pass_fds=fds)
    its.close()
    with ours:
        ours.settimeout(5)
        assert ours.recv(65536).startswith(b"HELO")
        below = children(worker.pid)
        worker.send_signal(signal.SIGTERM)  # a service manager's, to all processes: we decide when
        assert worker.poll() is None
    assert worker.wait(2) == 0
    wait_for(
        lambda: [pid for pid in below if Path(f"/proc/{pid}").exists()],
        2,
        "its child",
        lambda left: not left,
    )


@pytest.mark.parametrize("plane", PLANES)
def test_what_is_no_tun_is_refused(plane: Plane) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, Path("/dev/null").open("rb") as null:
        pump = Pump(null.fileno(), udp.fileno(), plane)
        with pytest.raises(PumpDown):
            pump.start()
        assert pump.running is None
