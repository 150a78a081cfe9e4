"""A netlink socket and the frame of its messages (netlink(7), linux/netlink.h).

Everything in netlink is native-endian and aligned to 4 bytes. A message is a 16-byte header, a fixed body
that depends on its type, and attributes.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple, TypeAlias

from flanneld_py.errors import KernelError

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python's socket module does not name it
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_CAPPED = 0x100
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
MAX_ERRNO = 4095  # linux/err.h
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF  # without the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER

HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence number, port id."""
ATTRIBUTE = struct.Struct("=HH")
"""Length with these 4 bytes, type."""
U32 = struct.Struct("=I")
I32 = struct.Struct("=i")
U16 = struct.Struct("=H")
FLAGS_OFFSET = 6
SEQUENCE_OFFSET = 8

RECEIVE_BUFFER = 32 << 20
"""Room for the errors of a whole chunk, and for notifications of some forty thousand changes by others, of
which each takes three quarters of a kilobyte. It is a limit: nothing is reserved."""
CHUNK = 500
"""Messages per send: larger ones gain nothing and need more of the send buffer (212,992 by default)."""
ANSWER_TIMEOUT = struct.pack("@ll", 10, 0)  # struct timeval
DUMP_ATTEMPTS = 10
RECEIVE_SIZE = 1 << 16
"""The kernel fills at most 32 KiB of a dump into one datagram (net/netlink/af_netlink.c)."""


Row: TypeAlias = tuple[bytes, int, int]
"""One message of a dump: the datagram that holds it, where its body begins, where it ends."""


class ProtocolMissing(KernelError):
    """The kernel has no netlink of this kind."""


UNREADABLE = (struct.error, ValueError, LookupError, OverflowError)
"""What comes of taking apart a message that is not as documented: too short, a part missing, odd sizes."""


@contextmanager
def understanding(what: str) -> Iterator[None]:
    """Around the reading of the kernel's answers; also a decorator.

    Raises:
        KernelError: one of them makes no sense; nothing may be concluded from any.
    """
    try:
        yield
    except UNREADABLE as error:
        raise KernelError(f"cannot understand {what} that the kernel shows: {error}") from error


class Failure(NamedTuple):
    """Why the kernel refused one message."""

    code: int
    """As in errno.h."""
    reason: str
    """In words: `Nexthop has invalid gateway (EINVAL)`."""


def failure(code: int, text: str = "") -> Failure:
    """Put an error number and the kernel's own explanation, if it gave one, into words."""
    if code == errno.EPERM:
        text = text or "not permitted, needs CAP_NET_ADMIN"
    name = errno.errorcode.get(code, str(code))
    return Failure(code, f"{text.rstrip('.') or os.strerror(code)} ({name})")


def attribute(kind: int, payload: bytes) -> bytes:
    return ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) & 3)


def message(kind: int, flags: int, body: bytes) -> bytes:
    """One request; the sequence number is filled in when it is sent."""
    return HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body


def attributes(datagram: bytes, start: int, end: int) -> dict[int, bytes]:
    """Type → payload of the attributes between two offsets; of a repeated type the last one."""
    found: dict[int, bytes] = {}
    unpack = ATTRIBUTE.unpack_from
    while start + 4 <= end:
        length, kind = unpack(datagram, start)
        if length < 4 or start + length > end:
            break
        found[kind & NLA_TYPE_MASK] = datagram[start + 4 : start + length]
        start += length + 3 & ~3
    return found


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Type, flags, sequence, port id, and where the body begins and ends, of each message in a datagram."""
    start, size = 0, len(datagram)
    unpack = HEADER.unpack_from
    while start + 16 <= size:
        length, kind, flags, sequence, port = unpack(datagram, start)
        if length < 16 or start + length > size:
            return
        yield kind, flags, sequence, port, start + 16, start + length
        start += length + 3 & ~3


def error_of(datagram: bytes, flags: int, start: int, end: int) -> Failure | None:
    """The content of an NLMSG_ERROR or NLMSG_DONE; None: it is a plain acknowledgement."""
    if end - start < 4:
        return None
    (code,) = I32.unpack_from(datagram, start)
    if code >= 0:
        return None
    offset = start + 4
    if end - start >= 20:  # NLMSG_ERROR repeats the header of the refused message, or all of it
        (length,) = U32.unpack_from(datagram, offset)
        offset += 16 if flags & NLM_F_CAPPED else length + 3 & ~3
    said = attributes(datagram, offset, end).get(NLMSGERR_ATTR_MSG, b"")
    text = said.rstrip(b"\0").decode(errors="replace")
    return failure(min(-code, MAX_ERRNO), text if text.isprintable() else "")


def open_socket(protocol: int = socket.NETLINK_ROUTE) -> socket.socket:
    """A bound netlink socket with a large receive buffer.

    Raises:
        ProtocolMissing: the kernel was built without.
        KernelError: it gives no socket.
    """
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except PermissionError:
            # Reading works without CAP_NET_ADMIN; writing will say what is missing.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.bind((0, 0))
    except OSError as error:
        kind = ProtocolMissing if error.errno == errno.EPROTONOSUPPORT else KernelError
        raise kind(f"cannot open a netlink socket: {error.strerror}") from error
    return sock


def numbered(requests: Sequence[bytes], first: int) -> bytearray:
    """Requests in one datagram, with sequence numbers from `first` on; the last is to be acknowledged."""
    datagram = bytearray().join(requests)
    start = 0
    # Those of one size all at once: byte by byte of the numbers, in steps of that size.
    for size, run in groupby(map(len, requests)):
        count = len(list(run))
        end = start + count * size
        numbers = struct.pack(f"={count}I", *range(first, first + count))
        for byte in range(U32.size):
            datagram[start + SEQUENCE_OFFSET + byte : end : size] = numbers[byte :: U32.size]
        start, first = end, first + count
    flags_at = len(datagram) - len(requests[-1]) + FLAGS_OFFSET
    (flags,) = U16.unpack_from(datagram, flags_at)
    U16.pack_into(datagram, flags_at, flags | NLM_F_ACK)
    return datagram


class NetlinkSocket:
    """Requests to the kernel and their answers. Used by one thread at a time."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = open_socket(protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, ANSWER_TIMEOUT)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self.port_id: int = self._socket.getsockname()[0]
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def dump(
        self, what: str, kind: int, body: bytes, absent: Collection[int] = (), *, torn: bool = False
    ) -> list[Row]:
        """The answers to a dump request (RTM_GET…).

        A dump during which the table changed may miss rows, so it is repeated.

        Args:
            what: the table's name, for messages to people.
            kind: the request's type.
            body: its fixed body and attributes; the kernel filters by them.
            absent: errors (errno.h) that mean that there is no such table, hence no rows.
            torn: not repeated; the caller knows better what has changed.

        Raises:
            KernelError: the kernel said no or nothing, or nothing consistent.
        """
        for _ in range(DUMP_ATTEMPTS):
            self._sequence = self._sequence + 1 & 0xFFFF_FFFF
            request = message(kind, NLM_F_DUMP, body)
            try:
                self._socket.send(request[:SEQUENCE_OFFSET] + U32.pack(self._sequence) + request[12:])
                rows, refused, interrupted = self._receive_dump()
            except OSError as error:
                raise KernelError(f"cannot read {what} from the kernel: {error.strerror}") from error
            if refused is not None:
                if refused.code in absent:
                    return []
                raise KernelError(f"cannot read {what} from the kernel: {refused.reason}")
            if torn or not interrupted:
                return rows
        raise KernelError(f"cannot read {what} from the kernel: they kept changing while being read")

    def ask(self, kind: int, body: bytes) -> Row | Failure:
        """The one answer to a request that is no dump (RTM_GETROUTE for one destination).

        Raises:
            KernelError: the kernel said nothing.
        """
        self._sequence = self._sequence + 1 & 0xFFFF_FFFF
        request = message(kind, 0, body)
        try:
            self._socket.send(request[:SEQUENCE_OFFSET] + U32.pack(self._sequence) + request[12:])
            while True:
                datagram = self._socket.recv(RECEIVE_SIZE)
                for answer, flags, sequence, _, start, end in messages(datagram):
                    if sequence != self._sequence:
                        continue
                    if answer != NLMSG_ERROR:
                        return datagram, start, end
                    return error_of(datagram, flags, start, end) or failure(errno.ENOMSG)
        except OSError as error:
            raise KernelError(f"the kernel does not answer: {error.strerror}") from error

    def _receive_dump(self) -> tuple[list[Row], Failure | None, bool]:
        rows: list[Row] = []
        all_flags = 0
        unpack = HEADER.unpack_from
        while True:
            datagram = self._socket.recv(RECEIVE_SIZE)
            start, size = 0, len(datagram)
            while start + 16 <= size:
                length, kind, flags, sequence, _ = unpack(datagram, start)
                if sequence != self._sequence or length < 16:
                    break  # what is left of an earlier dump that was given up
                all_flags |= flags
                if kind > NLMSG_DONE:
                    rows.append((datagram, start + 16, start + length))
                elif kind >= NLMSG_ERROR:
                    refused = error_of(datagram, flags, start + 16, start + length)
                    return rows, refused, bool(all_flags & NLM_F_DUMP_INTR)
                start += length + 3 & ~3

    def transact(self, requests: Sequence[bytes]) -> list[Failure | None]:
        """Send requests (made without NLM_F_ACK), many in one datagram; what became of each, in order.

        The kernel works through a datagram within the send call, message by message, and goes on after one
        it refuses. Only the last of a chunk asks for an acknowledgement: errors are answered anyway, and one
        answer for each message would overflow the receive buffer.
        """
        outcomes: list[Failure | None] = []
        for start in range(0, len(requests), CHUNK):
            outcomes += self._transact_chunk(requests[start : start + CHUNK])
        return outcomes

    def _transact_chunk(self, requests: Sequence[bytes]) -> list[Failure | None]:
        first = self._sequence + 1
        if first + len(requests) > 0xFFFF_FFFF:
            first = 1
        self._sequence = first + len(requests) - 1
        try:
            self._socket.send(numbered(requests, first))
        except OSError as error:
            return [failure(error.errno or 0)] * len(requests)
        return self._outcomes(first, len(requests))

    def _outcomes(self, first: int, count: int) -> list[Failure | None]:
        outcomes: list[Failure | None] = [None] * count
        overflow = False
        while True:
            try:
                # The send call has queued all answers already.
                datagram = self._socket.recv(RECEIVE_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    return [failure(error.errno or 0)] * count
                overflow = True
                continue
            for kind, flags, sequence, _, start, end in messages(datagram):
                if kind == NLMSG_ERROR and 0 <= sequence - first < count:
                    outcomes[sequence - first] = error_of(datagram, flags, start, end)
                    if sequence - first == count - 1 and not overflow:
                        return outcomes
        lost = failure(errno.ENOBUFS, "the kernel's answer was lost")
        return [outcome or lost for outcome in outcomes]
