"""Super-packets without DF on a path narrower than the TUN: the segments that fit and those that do not."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tests.netns.udp_ends import End, as_peer, inside

if TYPE_CHECKING:
    from flanneld_py.lab import Lab
    from flanneld_py.udp.pump import Plane

IP_MTU_DISCOVER, IP_PMTUDISC_DONT, UDP_SEGMENT = 10, 0, 103
PORT = 7001


@pytest.mark.parametrize("plane", ["native", "python"])
def test_a_last_segment_that_fits_is_sent(lab: Lab, plane: Plane) -> None:
    """The others are fragmented; it was once counted as refused."""
    assert lab.etcd
    hosts = lab.add_hosts("a", "b")
    a, b = (End(host, plane, ()) for host in hosts)
    try:
        a.pump.set_table(a.table([as_peer(b.host)]))
        b.pump.set_table(b.table([as_peer(a.host)]))
        a.host.ip("route", "add", b.host.address, "dev", "eth0", "mtu", "1300")
        with inside(b.host.pod):
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            receiver.bind((b.host.pod.address, PORT))
        with inside(a.host.pod):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.settimeout(5)
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1400)
        with receiver, sender:
            for _ in range(2):  # the first one finds out how narrow it is
                sender.sendto(bytes(4 * 1400 + 100), (b.host.pod.address, PORT))
                sizes = [len(receiver.recv(2000)) for _ in range(5)]
                assert sizes == [1400] * 4 + [100]
        assert a.pump.counters()["send.fragmented"] >= 4
    finally:
        a.close()
        b.close()
