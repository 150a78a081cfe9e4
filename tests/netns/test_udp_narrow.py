"""Super-packets without DF on a path narrower than the TUN: the segments that fit and those that do not."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab.entering import inside
from tests.netns import test_udp_pump
from tests.netns.test_udp_pump import PLANES, pair
from tests.netns.udp_traffic import leaves_in_one_piece

if TYPE_CHECKING:
    from flanneld_py.lab import Lab
    from flanneld_py.udp.pump import Plane
    from tests.netns.test_udp_pump import MakeEnd
    from tests.netns.udp_ends import End

IP_MTU_DISCOVER, IP_PMTUDISC_DONT, UDP_SEGMENT = 10, 0, 103
PORT = 7001

make_end = test_udp_pump.make_end


def narrow(a: End, b: End) -> None:
    a.host.ip("route", "add", b.host.address, "dev", "eth0", "mtu", "1300")


def four_wide_and_a_short_one(a: End, b: End, times: int) -> None:
    """Each super-packet arrives."""
    with inside(b.host.pod):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((b.host.pod.address, PORT))
    with inside(a.host.pod):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.settimeout(5)
    sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
    sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1400)
    with receiver, sender:
        for _ in range(times):
            sender.sendto(bytes(4 * 1400 + 100), (b.host.pod.address, PORT))
            sizes = [len(receiver.recv(2000)) for _ in range(5)]
            assert sizes == [1400] * 4 + [100]


@pytest.mark.parametrize("plane", PLANES)
def test_a_last_segment_that_fits_is_sent(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    """The others are fragmented; it was once counted as refused."""
    a, b = pair(lab, make_end, (plane, plane))
    narrow(a, b)
    four_wide_and_a_short_one(a, b, times=2)  # the first one finds out how narrow it is
    assert a.pump.counters()["send.fragmented"] >= 4


@pytest.mark.parametrize("plane", PLANES)
def test_a_narrow_path_takes_udp_segment_for_what_fits(lab: Lab, make_end: MakeEnd, plane: Plane) -> None:
    """A last segment that fits was once taken as a sign that the offload was what the kernel refused."""
    a, b = pair(lab, make_end, (plane, plane))
    narrow(a, b)
    four_wide_and_a_short_one(a, b, times=1)
    assert leaves_in_one_piece(a.host, a.host.pod, b.host.pod)
