"""What a strange kernel may show of a table of legacy iptables: struct ipt_getinfo, then the entries.

An input is a byte for the family, then that answer of the kernel.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from flanneld_py.drivers.xtdecode import INFO, decode_table, read_info, without_counters
from flanneld_py.errors import KernelError
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.drivers.xtdecode import Family

FAMILIES: tuple[Family, Family] = ("ip", "ip6")
HEADS = {"ip": 112, "ip6": 168}
ACCEPT, DROP, RETURN = -2, -1, -5


def check(data: bytes) -> None:
    family = FAMILIES[data[0] & 1] if data else "ip"
    body = data[1:]
    info = read_info(body[: INFO.size].ljust(INFO.size, b"\0"))  # the kernel gives as much as it is asked for
    entries = body[INFO.size :]
    try:
        chains = decode_table(family, "filter", info, entries)
        some = decode_table(family, "filter", info, entries, {"FORWARD", "USER"})
        blank = without_counters(family, entries)
    except KernelError as error:
        one_line(str(error)[:300], "tables entries")
        return
    assert some.items() <= chains.items()
    assert len(blank) == len(entries)
    assert without_counters(family, blank) == blank
    for key, chain in chains.items():
        assert key[:3] == ("legacy", family, "filter")
        hash(chain)
    assert sum(len(chain.rules) for chain in chains.values()) <= len(entries) // HEADS[family]


# --- seeds ----------------------------------------------------------------------------------------


def _part(name: bytes, payload: bytes, revision: int = 0) -> bytes:
    padded = payload + bytes(-len(payload) % 8)
    return struct.pack("=H29sB", 32 + len(padded), name, revision) + padded


def _entry(family: Family, target: bytes, matches: bytes = b"", source: bytes = b"") -> bytes:
    head = bytearray(HEADS[family])
    half, width = len(source) // 2, 4 if family == "ip" else 16
    head[:half] = source[:half]
    head[2 * width : 2 * width + half] = source[half:]
    at = len(head) + len(matches)
    struct.pack_into("=HH", head, 88 if family == "ip" else 140, at, at + len(target))
    return bytes(head) + matches + target


def _standard(verdict: int) -> bytes:
    return _part(b"", struct.pack("=i", verdict))


def _table(number: int, matches: bytes) -> bytes:
    family = FAMILIES[number]
    source = bytes((10, 5, 0, 0, 255, 255, 0, 0)) if family == "ip" else bytes(16) + b"\xff" * 6 + bytes(10)
    entries = [
        _entry(family, _standard(ACCEPT), matches, source),
        _entry(family, _part(b"MASQUERADE", bytes(20)), matches),
        _entry(family, _standard(DROP)),
        _entry(family, _part(b"ERROR", b"USER" + bytes(26))),
        _entry(family, _standard(ACCEPT)),
        _entry(family, _standard(RETURN)),
        _entry(family, _part(b"ERROR", b"ERROR" + bytes(25))),
    ]
    size = sum(map(len, entries))
    info = struct.pack("@32sI5I5III", b"filter", 1 << 2, *(0,) * 5, *(0, 0, len(entries[0]), 0, 0), 7, size)
    return bytes([number]) + info + b"".join(entries)


def seeds() -> Iterator[bytes]:
    matches = (
        b"",
        _part(b"comment", b"hello".ljust(256, b"\0")),
        _part(b"conntrack", bytes(146) + b"\1\0\0\0\2\0\0\0", 3),
        _part(b"mark", struct.pack("=IIB", 1, 0xFF, 0), 1),
        _part(b"state", struct.pack("=I", 6)),
        _part(b"strange", b""),
    )
    for number in range(len(FAMILIES)):
        yield from (_table(number, match) for match in matches)
        yield _table(number, b"".join(matches))[:-40]
    yield b""


TARGET = Target(
    check,
    seeds,
    words=("MASQUERADE", "ERROR", "comment", "conntrack", "mark", "state", "REJECT", "NFQUEUE", "DNAT"),
)
