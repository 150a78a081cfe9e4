"""Tables of legacy iptables in the kernel's form; tests/netns/test_xtables.py reads those of real tools."""

from __future__ import annotations

import struct
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.drivers.xtdecode import Family, TableInfo, decode_table, read_info, without_counters
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey, Match, Rule, Verdict
from tests.unit.strategies import usual

ACCEPT, DROP, RETURN = -2, -1, -5
HEADS: dict[Family, int] = {"ip": 112, "ip6": 168}
"""Bytes before the matches (linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h)."""


def part(name: bytes, payload: bytes) -> bytes:
    padded = payload + bytes(-len(payload) % 8)
    return struct.pack("=H29sB", 32 + len(padded), name, 0) + padded


def entry(family: Family, target: bytes, source: bytes = b"", packets: int = 0, flags: int = 0) -> bytes:
    """One without matches; `source`: address and mask."""
    half, head = len(source) // 2, bytearray(HEADS[family])
    width = 4 if family == "ip" else 16
    head[0:half] = source[:half]
    head[2 * width : 2 * width + half] = source[half:]
    head[82 if family == "ip" else 131] = flags
    struct.pack_into("=HH", head, 88 if family == "ip" else 140, len(head), len(head) + len(target))
    struct.pack_into("=QQ", head, len(head) - 16, packets, 100 * packets)
    return bytes(head) + target


def standard(verdict: int) -> bytes:
    return part(b"", struct.pack("=i", verdict))


def error(name: bytes) -> bytes:
    return part(b"ERROR", name + bytes(30 - len(name)))


def table(family: Family, source: bytes, packets: int = 7) -> tuple[TableInfo, bytes]:
    """FORWARD with policy drop: go to USER, which accepts from `source`."""
    plain = len(entry(family, standard(0)))
    marker = len(entry(family, error(b"")))
    goto = 2 if family == "ip" else 4
    entries = [
        entry(family, standard(2 * plain + marker), packets=packets, flags=goto),
        entry(family, standard(DROP), packets=packets),
        entry(family, error(b"USER")),
        entry(family, standard(ACCEPT), source, packets),
        entry(family, standard(RETURN)),
        entry(family, error(b"ERROR")),
    ]
    return TableInfo(1 << 2, (0,) * 5, (0, 0, plain, 0, 0), sum(map(len, entries))), b"".join(entries)


SOURCES: dict[Family, tuple[str, bytes]] = {
    "ip": ("10.5.0.0/16", bytes([10, 5, 0, 0, 255, 255, 0, 0])),
    "ip6": ("fd00:5::/32", bytes.fromhex("fd000005") + bytes(12) + b"\xff" * 4 + bytes(12)),
}


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_a_table_is_taken_apart(family: Family) -> None:
    text, source = SOURCES[family]
    accept = Rule((Match("saddr", (ip_network(text),)),), Verdict("accept"))
    assert decode_table(family, "filter", *table(family, source)) == {
        ChainKey("legacy", family, "filter", "FORWARD"): Chain(
            (Rule((), Verdict("goto", "USER")),), "forward", "filter", 0, "drop"
        ),
        ChainKey("legacy", family, "filter", "USER"): Chain((accept,)),
    }


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_only_counters_are_left_out(family: Family) -> None:
    source = SOURCES[family][1]
    counted, fresh = table(family, source, packets=7)[1], table(family, source, packets=0)[1]
    assert counted != fresh
    assert without_counters(family, counted) == fresh
    assert without_counters(family, fresh) == fresh


def test_what_the_kernel_says_of_a_table() -> None:
    answer = struct.pack("=32s13I", b"filter", 0b01110, *range(1, 6), *range(11, 16), 9, 1552)
    assert read_info(answer) == TableInfo(0b01110, (1, 2, 3, 4, 5), (11, 12, 13, 14, 15), 1552)


def test_an_entry_without_length_is_no_endless_loop() -> None:
    info, entries = table("ip", b"")
    broken = entries[:90] + bytes(2) + entries[92:]
    with pytest.raises(KernelError, match="entry at 0 has length 0"):
        decode_table("ip", "filter", info, broken)
    with pytest.raises(KernelError, match="entry at 0 has length 0"):
        without_counters("ip", broken)


@usual
@given(st.data(), st.sampled_from(["ip", "ip6"]))
def test_nonsense_is_an_error_or_rules_but_no_crash(data: st.DataObject, family: Family) -> None:
    info, entries = table(family, SOURCES[family][1])
    broken = bytearray(entries[: data.draw(st.integers(0, len(entries)))])
    for _ in range(data.draw(st.integers(0, 4)) if broken else 0):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        chains = decode_table(family, "filter", info, bytes(broken))
    except KernelError:
        return
    assert all(isinstance(chain, Chain) for chain in chains.values())
