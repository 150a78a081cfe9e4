"""Messages of any sizes in one datagram: numbered one by one, the last alone to be acknowledged."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.drivers.netlink import numbered

ACK = 4
"""NLM_F_ACK (linux/netlink.h)."""


def request(body: int, flags: int) -> bytes:
    """A message of that many bytes after its header, which are all ones."""
    return struct.pack("=IHHII", 16 + body, 24, flags, 0, 0) + b"\xff" * body


@given(
    st.lists(st.tuples(st.integers(0, 4).map((4).__mul__), st.sampled_from((1, 0x501))), min_size=1),
    st.integers(1, 2**32 - 200),
)
def test_each_is_found_by_its_number(shapes: list[tuple[int, int]], first: int) -> None:
    datagram = bytes(numbered([request(body, flags) for body, flags in shapes], first))
    for place, (body, flags) in enumerate(shapes):
        length, kind, found, number, port = struct.unpack_from("=IHHII", datagram)
        assert (length, kind, number, port) == (16 + body, 24, first + place, 0)
        assert found == flags | (ACK if place == len(shapes) - 1 else 0)
        assert datagram[16:length] == b"\xff" * body
        datagram = datagram[length:]
    assert not datagram
