"""The C core of the udp data plane, run by tests/native/packet_driver.c, plain or under sanitizers."""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from flanneld_py.udp.reference import DROPS, Vnet

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "flanneld_py" / "udp" / f"{name}.c" for name in ("packet", "table", "segment", "join", "icmp")
]
NATIVE = ROOT / "tests" / "native"
STRICT = ["-std=c11", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
PUMP = [str(SOURCES[0].with_name(name)) for name in ("pump.c", "lanes.c")]
SWAPS = ["-D_GNU_SOURCE", "-pthread", str(NATIVE / "table_swaps.c"), *PUMP]
BUILDS = {
    "plain": ["-O3", str(NATIVE / "packet_driver.c")],
    "sanitized": [*SANITIZERS, str(NATIVE / "packet_driver.c")],
    "replay": [*SANITIZERS, "-DREPLAY", str(NATIVE / "fuzz_packet.c")],
    "swaps-address": [*SANITIZERS, *SWAPS],
    "swaps-thread": ["-O1", "-fsanitize=thread", *SWAPS],
}
DRIVERS = ("sanitized", "plain")
"""In the order in which they are heard: the first one says what is wrong where the other may hang."""
UNKNOWN = 0xFFFFFFFF
FITS = ("whole", "fragments", "too-big")
TCP, UDP = 1, 2
"""What may be joined."""


@functools.cache
def build(how: str, cc: str = "") -> Path:
    """A program of BUILDS, all warnings being errors; gone at the end of the tests. `cc`: $CC, or else cc."""
    compiler = shlex.split(cc or os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no C compiler {compiler[0]} here")
    place = TemporaryDirectory(prefix="packet-core-")
    atexit.register(place.cleanup)
    program = Path(place.name) / how
    flags = [*STRICT, *BUILDS[how], f"-I{SOURCES[0].parent}"]
    built = subprocess.run(
        [*compiler, *flags, "-o", program, *SOURCES], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return program


@dataclass(frozen=True, slots=True)
class Joined:
    """One entry of a joiner."""

    vnet: bytes
    packet: bytes
    """What follows the vnet header."""
    split: list[bytes]


class Core:
    """The driver, running, plain and sanitized; both must answer alike. In the terms of reference.py."""

    def __init__(self) -> None:
        self._running = [
            subprocess.Popen([build(how)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for how in DRIVERS
        ]

    def close(self) -> None:
        """Ends it; fails when a sanitizer has something to say."""
        for process in self._running:
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        assert [process.returncode for process in self._running] == [0] * len(self._running)

    def _ask(self, what: str, data: bytes = b"") -> bytes:
        for process in self._running:
            assert process.stdin is not None
            process.stdin.write(struct.pack("<I", 1 + len(data)) + what.encode() + data)
            process.stdin.flush()
        answers = [_answer(process, what + data.hex()) for process in self._running]
        assert answers.count(answers[0]) == len(answers)
        return answers[0]

    def names(self) -> tuple[str, ...]:
        return tuple(self._ask("n").decode().split())

    def open_table(self, packed: bytes) -> str:
        """What is wrong with it; "" when it is in use now."""
        return self._ask("t", packed).decode()

    def accept(self, sender: int | None, packet: bytes) -> str | None:
        return _reason(self._ask("a", struct.pack("<I", UNKNOWN if sender is None else sender) + packet)[0])

    def route(self, packet: bytes) -> tuple[str | None, int | None]:
        reason, peer = struct.unpack("<BI", self._ask("r", packet))
        return _reason(reason), None if peer == UNKNOWN else peer

    def fit(self, packet: bytes, vnet: Vnet, mtu: int) -> str:
        return FITS[self._ask("f", struct.pack("<I", mtu) + vnet.pack() + packet)[0]]

    def send(self, packet: bytes, vnet: Vnet) -> tuple[str | None, list[bytes]]:
        """packet_finish, then the segments of a super-packet."""
        answer = self._ask("s", vnet.pack() + packet)
        return _reason(answer[0]), list(_slices(answer[1:]))

    def fragments(self, packet: bytes, mtu: int) -> list[bytes]:
        return list(_slices(self._ask("g", struct.pack("<I", mtu) + packet)))

    def icmp(self, kind: int, mtu: int, packet: bytes) -> bytes:
        return self._ask("i", struct.pack("<BI", kind, mtu) + packet)

    def join(self, packets: Sequence[bytes], allowed: int = TCP | UDP) -> list[Joined]:
        body = b"".join(struct.pack("<I", len(packet)) + packet for packet in packets)
        slices, entries = _slices(self._ask("j", bytes([allowed]) + body)), []
        for written in slices:
            split = list(iter(lambda: next(slices), b""))
            entries.append(Joined(written[:10], written[10:], split))
        return entries

    def budget(self, times: Sequence[int]) -> list[bool]:
        return [bool(byte) for byte in self._ask("b", struct.pack(f"<{len(times)}Q", *times))]

    def find_peer(self, address: bytes) -> tuple[int, bytes, bytes, int] | None:
        """Index, address and port as on the wire, flags."""
        answer = self._ask("p", address)
        if len(answer) == 4:
            return None
        index, found, port, flags = struct.unpack("<I4s2sI", answer)
        return index, found, port, flags

    def checksum(self, data: bytes, skip: int) -> int:
        """Of `data`, which lies `skip` bytes from an aligned address; not complemented."""
        return int.from_bytes(self._ask("c", bytes([skip]) + bytes(skip) + data), "big")


def _answer(process: subprocess.Popen[bytes], request: str) -> bytes:
    assert process.stdout is not None
    head = process.stdout.read(4)
    assert head, f"it ended with {process.wait(timeout=10)} when asked {request}"
    return process.stdout.read(int.from_bytes(head, "little"))


def _reason(number: int) -> str | None:
    return DROPS[number] if number else None


def _slices(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        yield data[at + 4 : at + 4 + length]
        at += 4 + length
