"""Forwarding again at once with what an earlier process left, before the daemon has imported its parts.

What was kept are the descriptors of TUN and socket, in whose queues packets wait, and in a memfd what the
pump worked with (remembered.py). This imports little, as every millisecond is one that packets wait.
"""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.udp.kept import SOCKET, TABLE, TUN
from flanneld_py.udp.pump import Plane, Pump, PumpDown

CUT = struct.Struct("<4sIII8s")
"""Magic, checksum of the rest, lengths of settings and table, data plane."""
MAGIC = b"FPR1"
LONGEST = 64 << 20
"""Bytes: 10,000 peers take 200 KB."""
PLANES: dict[bytes, Plane] = {b"auto": "auto", b"native": "native", b"python": "python"}


class Cut(NamedTuple):
    """A remembered pump, not read any further."""

    plane: Plane
    text: bytes
    table: bytes


class Resumed(Struct, frozen=True):
    """A pump at work, and what it works with."""

    pump: Pump
    tun: int
    udp: socket.socket
    cut: Cut
    memory: int = -1
    """Of what was remembered; -1: it was not kept."""

    def release(self) -> dict[str, int]:
        """Stop the pump; the descriptors it had, by name."""
        self.pump.close()
        found = {TUN: self.tun, SOCKET: self.udp.detach(), TABLE: self.memory}
        return {name: fd for name, fd in found.items() if fd >= 0}


def cut(whole: bytes) -> Cut | None:
    """None for anything that is not whole."""
    if len(whole) < CUT.size:
        return None
    magic, checksum, text, table, plane = CUT.unpack_from(whole)
    end = CUT.size + text + table
    if magic != MAGIC or len(whole) < end or zlib.crc32(whole[CUT.size : end]) != checksum:
        return None
    if (chosen := PLANES.get(plane.rstrip(b"\0"))) is None:
        return None
    return Cut(chosen, whole[CUT.size : CUT.size + text], whole[CUT.size + text : end])


def resume(kept: Mapping[str, int]) -> Resumed | None:
    """Start a pump on kept descriptors, by name; None when that cannot be, and then they stay open."""
    if not {TUN, SOCKET, TABLE} <= kept.keys():
        return None
    with suppress(OSError, PumpDown, ValueError):
        found = cut(os.pread(kept[TABLE], LONGEST, 0))
        if found is not None:
            started = start(kept[TUN], socket.socket(fileno=os.dup(kept[SOCKET])), found)
            os.close(kept[SOCKET])
            return replace(started, memory=kept[TABLE])
    return None


def tried(plane: Plane) -> Plane:
    """Packets are forwarded in Python rather than not at all; that it should be native is told."""
    return "auto" if plane == "native" else plane


def start(tun: int, udp: socket.socket, found: Cut) -> Resumed:
    """Start a pump on these.

    Raises:
        PumpDown: it does not start.
        ValueError: the table is not accepted.
    """
    pump = Pump(tun, udp.fileno(), tried(found.plane))
    try:
        pump.start()
        pump.set_table(found.table)
    except BaseException:
        pump.close()
        udp.close()
        raise
    return Resumed(pump, tun, udp, found)
