"""One peer behind a slow queue, and one container that floods: the others are not held up by them."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from flanneld_py.lab.entering import inside
from flanneld_py.udp import pump
from flanneld_py.udp.pump import ANSWER_WITHIN, CRASHES, PumpDown, open_socket
from tests.netns import test_udp_pump
from tests.netns.test_udp_pump import PLANES, join, pair
from tests.netns.udp_ends import PORT
from tests.netns.udp_packets import DF, ipv4

if TYPE_CHECKING:
    from pathlib import Path

    from flanneld_py.lab import Host, Lab
    from flanneld_py.udp.pump import Plane
    from tests.netns.test_udp_pump import MakeEnd
    from tests.netns.udp_ends import End

LANES = 32
PINGS, LOST = 10, 2
"""A busy machine may lose some."""
BACKLOG = 6 << 20
"""Bytes that may wait for one peer: twice what the socket is given, less the kernel's own share."""
FLOOD = """
import socket, sys, time
target, size, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if size > 1400:
    sender.setsockopt(17, 103, 1400)
while True:
    for _ in range(number):
        try:
            sender.sendto(bytes(size), (target, 9999))
        except OSError:
            pass
    time.sleep(0.01)
"""
BURSTS = {"super-datagrams": (1400 * 44, 1), "datagrams": (1400, 50)}
"""Size and number each 10 ms: 49 and 56 Mbit/s."""
SHORT, LONG = "pfifo limit 1000", "bfifo limit 400000000"
"""Queues: of the kernel's default length, and of one that never drops."""
TIMES = {"native": 6, "python": 1}
"""As many more: the queue of the device must not be what is full."""
RAW = """
import socket, sys, time
sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sender.setsockopt(263, 15, 1)
sender.bind(("eth0", 0x0800))
frame = open(sys.argv[1], "rb").read()
while True:
    for _ in range(20):
        try:
            sender.send(frame)
        except OSError:
            pass
    time.sleep(0.01)
"""
TCP = 6

make_end = test_udp_pump.make_end


def slow_down(host: Host, peer: Host, leaf: str) -> None:
    """20 Mbit/s to `peer`, and no limit to the rest."""
    for command in (
        "qdisc add dev eth0 root handle 1: htb default 10",
        "class add dev eth0 parent 1: classid 1:10 htb rate 10gbit quantum 60000",
        "class add dev eth0 parent 1: classid 1:20 htb rate 20mbit quantum 60000",
        f"qdisc add dev eth0 parent 1:20 handle 20: {leaf}",
        f"filter add dev eth0 parent 1: protocol ip prio 1 u32 match ip dst {peer.address}/32 flowid 1:20",
    ):
        host.run(["tc", *command.split()])


def backlog(host: Host) -> int:
    """Bytes that wait for the slow peer."""
    queues = host.run(["tc", "-s", "qdisc", "show", "dev", "eth0"])
    text = queues.partition(" 20: ")[2].partition("backlog ")[2].split()[0].removesuffix("b")
    for suffix, factor in (("K", 1 << 10), ("M", 1 << 20)):
        if text.endswith(suffix):
            return int(text[:-1]) * factor
    return int(text)


def answers_soon(end: End) -> None:
    """Both calls that the control plane waits for."""
    started = time.monotonic()
    assert end.tend() is None
    end.pump.counters()
    assert time.monotonic() - started < ANSWER_WITHIN / 2


def others_are_not_held_up(
    lab: Lab, make_end: MakeEnd, plane: Plane, burst: str, leaf: str, times: int
) -> None:
    """By one behind a slow queue `leaf`, to whom a container sends `times` BURSTS."""
    hosts = lab.add_hosts("a", "slow", "c")
    a, slow, c = (make_end(host, plane) for host in hosts)
    join(a, slow, c)
    slow_down(a.host, slow.host, leaf)
    size, number = BURSTS[burst]
    argv = ["python3", "-c", FLOOD, slow.host.pod.address, str(size), str(times * number)]
    flood = a.host.pod.spawn("flood", argv)
    try:
        if leaf == SHORT:  # it drops by itself
            wait_for(lambda: backlog(a.host), 20, "a queue", lambda seen: seen > 1 << 20)
        else:
            wait_for(lambda: a.drops().get("send.queue-full"), 20, "a full lane")
        for _ in range(3):
            assert a.host.pod.ping(c.host.pod.address, PINGS, wait=3).lost <= LOST
            answers_soon(a)
        assert backlog(a.host) < BACKLOG
    finally:
        a.host.pod.discard(flood)
    assert a.pump.restarts == 0


@pytest.mark.parametrize("leaf", [SHORT, LONG])
@pytest.mark.parametrize("burst", BURSTS)
@pytest.mark.parametrize("plane", PLANES)
def test_a_slow_peer_holds_up_no_other(
    lab: Lab, make_end: MakeEnd, plane: Plane, burst: str, leaf: str
) -> None:
    """One send buffer for all was once full of its packets."""
    others_are_not_held_up(lab, make_end, plane, burst, leaf, TIMES[plane])


def test_a_flood_of_super_datagrams_is_no_hang(lab: Lab, make_end: MakeEnd) -> None:
    """As fast as they can be made: a batch with many full sends was once taken for one that hangs."""
    a, b = pair(lab, make_end, ("native", "native"))
    slow_down(a.host, b.host, SHORT)
    argv = ["python3", "-c", FLOOD, b.host.pod.address, str(1400 * 44), "100000000"]
    flood = a.host.pod.spawn("flood", argv)
    try:
        end = time.monotonic() + 2 * ANSWER_WITHIN
        while time.monotonic() < end:
            answers_soon(a)
            assert a.pump.counters()["send.busy-ms"] < 1000
            time.sleep(0.2)
    finally:
        a.host.pod.discard(flood)
    assert a.pump.restarts == 0


def mac(octets: str) -> bytes:
    return bytes.fromhex(octets.replace(":", ""))


def tiny_segments(end: End, target: str, path: Path) -> None:
    """A frame of 60,000 bytes of TCP to be cut into as many packets, after a struct virtio_net_hdr."""
    pod, bridge = end.host.pod, end.host.pod_bridge
    ethernet = mac(end.host.ip("link", "show", "dev", bridge)[0]["address"])
    ethernet += mac(pod.ip("link", "show", "dev", "eth0")[0]["address"]) + b"\x08\x00"
    header = struct.pack(">HHIIBBHHH", 1000, 2000, 5, 6, 5 << 4, 0x10, 1000, 0, 0)
    packet = ipv4(pod.address, target, header + bytes(60_000), protocol=TCP, field=DF)
    path.write_bytes(struct.pack("=BBHHHH", 1, 1, 54, 1, 34, 16) + ethernet + packet)


@pytest.mark.parametrize("plane", PLANES)
def test_super_packets_of_one_byte_a_segment(
    lab: Lab, make_end: MakeEnd, plane: Plane, tmp_path: Path
) -> None:
    """CAP_NET_RAW is enough to make them; they kept the pump busy for seconds each."""
    hosts = lab.add_hosts("a", "b", "c")
    a, b, c = (make_end(host, plane) for host in hosts)
    join(a, b, c)
    frame = tmp_path / "frame"
    tiny_segments(a, b.host.pod.address, frame)
    flood = a.host.pod.spawn("flood", ["python3", "-c", RAW, str(frame)])
    try:
        wait_for(lambda: a.drops().get("send.offload", 0), 10, "drops", lambda seen: seen > 100)
        for _ in range(3):
            assert a.host.pod.ping(c.host.pod.address, PINGS, wait=3).lost <= LOST
            answers_soon(a)
    finally:
        a.host.pod.discard(flood)
    assert a.pump.restarts == 0


# --- the sockets to send by -----------------------------------------------------------------------


@pytest.mark.parametrize("plane", PLANES)
def test_only_one_socket_receives(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    """Nor does one of another program that joins; without SO_REUSEPORT the port is refused, as ever."""
    a, b = pair(lab, make_end, (plane, plane))
    bound = a.host.run(["ss", "-uanH"]).count(f"{a.host.address}:{PORT} ")
    assert bound == LANES + 1
    with inside(a.host):
        joins = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    joins.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    joins.bind((a.host.address, PORT))
    number = 500
    packet = ipv4(b.host.pod.address, f"10.5.{a.host.number}.9", bytes(20))
    for _ in range(number):  # each from another port, as the kernel chooses by it
        with inside(b.host), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
            source.sendto(packet, (a.host.address, PORT))
    wait_for(lambda: a.pump.counters()["receive.packets"], 10, "all", lambda seen: seen == number)
    joins.close()
    with inside(a.host), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind((a.host.address, PORT))
    with inside(a.host), pytest.raises(OSError, match="in use"):
        open_socket(a.host.address, PORT)
    a.start()  # while the old one still has its own
    assert a.host.pod.ping(b.host.pod.address, 2).lost == 0
    assert a.host.run(["ss", "-uanH"]).count(f"{a.host.address}:{PORT} ") == LANES + 1


# --- counters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", PLANES)
def test_a_dropped_super_packet_counts_each_of_its_packets(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, _ = pair(lab, make_end, (plane, plane))
    with inside(a.host.pod), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_UDP, 103, 1000)
        for _ in range(10):
            with suppress(OSError):  # net unreachable, of the one before
                sender.sendto(bytes(40_000), ("10.5.250.9", 9999))
            with suppress(OSError):
                sender.sendto(bytes(40_000), ("10.5.250.9", 9999))
    before = a.drops().get("send.no-route", 0)
    wait_for(lambda: a.drops().get("send.no-route", 0), 5, "drops", lambda seen: seen >= 400)
    assert before % 40 < 20  # no half ones, but the kernel's own search for routers


@pytest.mark.parametrize("plane", PLANES)
def test_bytes_are_those_of_packets_handed_on(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    a, b = pair(lab, make_end, (plane, plane))
    a.host.ip("link", "set", "flannel0", "down")
    packet = ipv4(b.host.pod.address, a.host.pod.address, bytes(80))
    with inside(b.host), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
        source.sendto(packet, (a.host.address, PORT))
        wait_for(lambda: a.drops().get("receive.write-failed"), 5, "a refusal")
        assert a.pump.counters()["receive.bytes"] == 0
        a.host.ip("link", "set", "flannel0", "up")
        source.sendto(packet, (a.host.address, PORT))
        seen = wait_for(a.pump.counters, 5, "a packet", lambda seen: seen["receive.packets"] > 0)
    assert seen["receive.bytes"] == len(packet)


# --- what follows from a hang ---------------------------------------------------------------------


def test_a_pump_that_hangs_is_no_reason_for_the_other_one(
    lab: Lab, make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine was once enough for an hour at a tenth of the speed."""
    monkeypatch.setattr(pump, "ANSWER_WITHIN", 1.0)
    end = make_end(lab.add_host("a"), "auto")

    def tended() -> int:
        with suppress(PumpDown):  # it is not time yet
            end.tend()
        return end.pump.running.pid if end.pump.running else 0

    for _ in range(CRASHES):
        pid = wait_for(tended, 10, "a worker")
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda gone=pid: tended() != gone, 10, "its end")  # type: ignore[misc]
    wait_for(tended, 10, "a worker")
    assert end.pump.running is not None
    assert end.pump.running.plane == "native"
