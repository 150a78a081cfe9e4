"""A kernel that answers whatever an input says, behind the netlink socket of a driver.

An input is a byte that chooses what is read, and then messages: each a byte for its type, a byte of flags,
two bytes of length, and its body.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from flanneld_py.drivers.netlink import NetlinkSocket

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

HEAD = struct.Struct("=BBH")
MESSAGE = struct.Struct("=IHHII")
ERROR, DONE = 2, 3
INTERRUPTED = 0x10
LIES, TWO_DATAGRAMS, TORN, NOT_ASKED = 0x1, 0x2, 0x4, 0x8
"""Flags: a wrong length in its header; a new datagram begins; the table changed; another request's."""
MOST_MESSAGES = 64


class Message(NamedTuple):
    """One of an input."""

    kind: int
    flags: int
    body: bytes


def pack(messages: Iterable[Message], readers: int) -> Iterator[bytes]:
    """As inputs, one for each of so many readers."""
    packed = b"".join(HEAD.pack(m.kind, m.flags, len(m.body)) + m.body for m in messages)
    yield from (bytes([number]) + packed for number in range(readers))


def unpack(data: bytes) -> Iterator[Message]:
    start = 1
    for _ in range(MOST_MESSAGES):
        if start + HEAD.size > len(data):
            return
        kind, flags, length = HEAD.unpack_from(data, start)
        start += HEAD.size
        yield Message(kind, flags, data[start : start + length])
        start += length


class Wire:
    """Stands in the place of a socket: what is sent is kept, what is asked for is answered."""

    def __init__(self, messages: Iterable[Message], kinds: Collection[int]) -> None:
        """`kinds`: of answers, which messages of an input name by their number in this list."""
        self._messages = list(messages)
        self._kinds = tuple(kinds)
        self._pending: list[bytes] = []
        self.sent: list[bytes] = []

    def tell(self) -> None:
        """Send all messages of the input, asked or not."""
        self._pending = list(self._datagrams(0, None))

    def send(self, request: bytes) -> int:
        self.sent.append(bytes(request))
        _, kind, _, sequence, _ = MESSAGE.unpack_from(request)
        self._pending = [*self._datagrams(sequence, kind), MESSAGE.pack(16, DONE, 0, sequence, 0)]
        return len(request)

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        if not self._pending:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return self._pending.pop(0)

    def close(self) -> None:
        """Nothing to give back."""

    def _datagrams(self, sequence: int, asked: int | None) -> Iterator[bytes]:
        datagram = b""
        for message in self._messages:
            kind = self._kinds[message.kind % len(self._kinds)]
            # The answers of rtnetlink and nfnetlink have numbers just below those of the requests.
            if (
                asked is not None
                and kind > DONE
                and not message.flags & NOT_ASKED
                and not 0 < asked - kind <= 2
            ):
                continue
            if datagram and message.flags & TWO_DATAGRAMS:
                yield datagram
                datagram = b""
            length = 16 + len(message.body)
            if message.flags & LIES and len(message.body) >= 4:
                (length,) = struct.unpack_from("=I", message.body)
            interrupted = INTERRUPTED if message.flags & TORN else 0
            datagram += MESSAGE.pack(length, kind, interrupted, sequence, 0) + message.body
            datagram += bytes(-len(message.body) & 3)
        if datagram:
            yield datagram


class FuzzedSocket(NetlinkSocket):
    """A driver's socket with a wire for a kernel."""

    def __init__(self, wire: Wire) -> None:
        self._socket = wire  # type: ignore[assignment]
        self._sequence = 0
        self.port_id = 7
