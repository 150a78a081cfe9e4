"""Kernels and network cards that refuse an offload: nothing is lost, and nothing else falls back with it.

What refuses is a library between the pump and libc, tests/native/refusing_kernel.c.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns import test_udp_pump
from tests.netns.test_udp_pump import OFFLOADS, PLANES, join, pair
from tests.netns.udp_traffic import burst, exchange, leaves_in_one_piece, super_datagrams

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Lab
    from flanneld_py.udp.pump import Plane
    from tests.netns.test_udp_pump import MakeEnd

    Refuse = Callable[..., None]

SOURCE = Path(__file__).parents[1] / "native" / "refusing_kernel.c"
SIZE = 1 << 20
KERNELS = {
    "6.1": ("uso",),
    "that takes no TSO": ("tso", "uso"),
    "4.17": ("uso", "udp_gro", "udp_segment", "nowait"),
}
"""What these do not have; Debian 12 has the first one."""
SEGMENTS = 40
OF_ONE_BATCH = 64

make_end = test_udp_pump.make_end


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("refusing") / "refusing_kernel.so"
    flags = shlex.split("-std=gnu11 -Wall -Wextra -Werror -O1 -fPIC -shared")
    subprocess.run(["cc", *flags, "-o", str(built), str(SOURCE), "-ldl"], check=True)
    return built


@pytest.fixture
def refuse(library: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Pumps that are started from now on meet refusals; without arguments none."""

    def start_refusing(*what: str) -> None:
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("REFUSED", ",".join(what))

    return start_refusing


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("plane", PLANES)
def test_an_older_kernel(lab: Lab, make_end: MakeEnd, refuse: Refuse, plane: Plane, kernel: str) -> None:
    refuse(*KERNELS[kernel])
    a, b = pair(lab, make_end, (plane, plane))
    assert a.running.offloads == tuple(name for name in OFFLOADS if name not in KERNELS[kernel])
    exchange(a.host, b.host, SIZE)


@pytest.mark.parametrize("error", ["EIO", "EINVAL", "EMSGSIZE"])
@pytest.mark.parametrize("plane", PLANES)
def test_udp_segment_refused_for_one_destination(
    lab: Lab, make_end: MakeEnd, refuse: Refuse, plane: Plane, error: str
) -> None:
    hosts = lab.add_hosts("a", "b", "c")
    refuse(f"{error}@{hosts[1].address}")
    a, b, c = (make_end(host, plane, ipv6=True) for host in hosts)
    join(a, b, c)
    exchange(a.host, b.host, SIZE)
    assert a.pump.counters()["send.offload-refused"] == 1, "tried once, sent again, and not tried any more"
    assert not leaves_in_one_piece(a.host, a.host.pod, b.host.pod)
    assert leaves_in_one_piece(a.host, a.host.pod, c.host.pod), "the other destination keeps it"
    assert "send.send-failed" not in a.drops()


@pytest.mark.parametrize("plane", PLANES)
def test_another_error_is_no_reason_to_fall_back(
    lab: Lab, make_end: MakeEnd, refuse: Refuse, plane: Plane
) -> None:
    hosts = lab.add_hosts("a", "b")
    refuse(f"ENOBUFS@{hosts[1].address}")
    a, b = (make_end(host, plane) for host in hosts)
    join(a, b)
    with pytest.raises(TimeoutError):
        super_datagrams(a.host.pod, b.host.pod, b.host.pod.address, 500, SEGMENTS, patience=0.2)
    assert a.drops()["send.send-failed"] == SEGMENTS
    assert a.pump.counters()["send.offload-refused"] == 0
    burst(a.host.pod, b.host.pod, b.host.pod.address, [100, 200, 300], pause=1)


@pytest.mark.parametrize(
    ("refused", "told"), [("receive", "not connected"), ("read", "TUN device cannot be read")]
)
@pytest.mark.parametrize("plane", PLANES)
def test_reads_that_always_fail_end_the_worker(
    lab: Lab, make_end: MakeEnd, refuse: Refuse, plane: Plane, refused: str, told: str
) -> None:
    """It was once alive and well, and forwarded nothing."""
    refuse(refused)
    a, b = pair(lab, make_end, (plane, plane))
    a.host.pod.start_ping(b.host.pod.address, 0.1)
    b.host.pod.start_ping(a.host.pod.address, 0.1)
    wrong = wait_for(a.tend, 20, "the end of the worker")
    if (plane, refused) == ("python", "receive"):
        told = "received packets has ended"
    assert told in str(wrong)
    assert a.pump.counters()[f"{'receive' if refused == 'receive' else 'send'}.read-errors"] > 10


@pytest.mark.parametrize(("refused", "other"), [("write-udp", "tcp"), ("write-tcp", "udp")])
@pytest.mark.parametrize("plane", PLANES)
def test_a_tun_that_refuses_super_packets_of_one_kind(
    lab: Lab, make_end: MakeEnd, refuse: Refuse, plane: Plane, refused: str, other: str
) -> None:
    refuse(refused)
    a, b = pair(lab, make_end, (plane, plane))
    exchange(a.host, b.host, SIZE)
    counters = b.pump.counters()
    assert 0 < counters["receive.offload-refused"] <= OF_ONE_BATCH
    assert counters["receive.super-packets"] > 0, other
    assert "receive.write-failed" not in b.drops()
