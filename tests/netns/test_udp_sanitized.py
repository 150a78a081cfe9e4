"""The real pump under AddressSanitizer and UndefinedBehaviorSanitizer, and its threads under ThreadSanitizer.

What runs are tests of test_udp_pump.py and test_udp_slow.py: every path through the native pump, and all that
its threads share.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.netns import sanitizers
from tests.netns import test_udp_pump as tests
from tests.netns import test_udp_slow as slow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Lab
    from flanneld_py.udp.pump import Plane
    from tests.netns.sanitizers import Sanitized
    from tests.netns.udp_ends import End

    MakeEnd = Callable[..., End]

BOTH: tuple[Plane, Plane] = ("native", "native")
CASES: dict[str, Callable[..., None]] = {
    "every-byte": partial(tests.test_every_byte_arrives, planes=BOTH),
    "plain-peer": partial(tests.test_a_peer_of_one_packet_a_datagram, plane="native"),
    "no-udp-gro": partial(tests.test_each_offload_forced_off, plane="native", off="udp_gro"),
    "no-uso": partial(tests.test_each_offload_forced_off, plane="native", off="uso"),
    "segment-refused": partial(tests.test_a_kernel_that_refuses_udp_segment, plane="native"),
    "ipv6": partial(tests.test_ipv6_inside, plane="native"),
    "icmp": partial(tests.test_icmp_errors, plane="native"),
    "narrow-path": partial(tests.test_a_path_narrower_than_the_mtu, plane="native"),
    "crafted": partial(tests.test_crafted_datagrams_are_counted, plane="native"),
    "flood": partial(tests.test_a_flood_from_a_stranger, plane="native"),
    "tables-replaced": partial(tests.test_large_tables_replaced_while_forwarding, plane="native"),
    "wrong-table": partial(tests.test_a_wrong_table_changes_nothing, plane="native"),
    "worker-replaced": partial(tests.test_a_replaced_worker_loses_nothing, planes=BOTH),
    "full-lane": partial(
        slow.others_are_not_held_up,
        plane="native",
        burst="datagrams",
        leaf=slow.LONG,
        times=1,  # it may be that slow
    ),
    "device-deleted": partial(tests.test_a_deleted_device, plane="native"),
}

make_end = tests.make_end


@pytest.fixture(scope="module", params=list(sanitizers.FLAGS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    kind: str = request.param
    return sanitizers.build(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture
def sanitized(built: Sanitized, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sanitized]:
    """Fails the test for whatever its workers' sanitizer has reported."""
    built.use(monkeypatch)
    yield built
    found = built.found()
    assert not found, found


def test_the_sanitizer_watches(lab: Lab, sanitized: Sanitized, make_end: MakeEnd) -> None:
    end = make_end(lab.add_host("a"))
    mapped = Path(f"/proc/{end.running.pid}/maps").read_text()
    assert str(sanitized.library.resolve()) in mapped
    assert str(sanitized.worker.with_name("_pump.abi3.so")) in mapped


@pytest.mark.parametrize("case", CASES)
def test_the_pump(lab: Lab, sanitized: Sanitized, make_end: MakeEnd, case: str) -> None:  # noqa: ARG001
    arguments: dict[str, Any] = {"lab": lab, "make_end": make_end}
    CASES[case](**arguments)
