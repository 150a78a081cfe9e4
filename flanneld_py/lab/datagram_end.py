"""One end of a stream of UDP datagrams or of an echo; run as a script in a pod's namespace.

`receive ADDRESS SIZE CPU` prints the port it listens on, takes datagrams until none comes for IDLE, and
prints how many came and in how many seconds.
`send ADDRESS PORT SIZE SECONDS CPU` sends as many as it can and prints how many.
`echo ADDRESS SIZE CPU` prints its port and sends every datagram back.
`ask ADDRESS PORT SIZE COUNT CPU` waits for each answer before it sends on, and prints the nanoseconds of each
round trip that was not lost.

A sender with a call for each datagram measures itself, so the streams go by sendmmsg(2) and recvmmsg(2), as
fast programs send them: each datagram is still a packet of its own. Python calls the C library, so nothing is
compiled.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import time

BATCH = 64
IDLE = 0.3
ROOM = 4 << 20
"""Of the sockets' buffers: what is lost is lost on the way."""
WARM_UP = 200
MOST_LOST = 20
"""Round trips without an answer, after which no more are tried."""
MSG_WAITFORONE = 0x10000


class IoVec(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Header(ctypes.Structure):
    """`struct msghdr` on Linux."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("pieces", ctypes.POINTER(IoVec)),
        ("piece_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Message(ctypes.Structure):
    """`struct mmsghdr`: with the length of what came."""

    _fields_ = (("header", Header), ("length", ctypes.c_uint))


class Batch:
    """BATCH datagrams for one call, each in a buffer of its own."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = connection.fileno()
        self._buffers = [ctypes.create_string_buffer(size) for _ in range(BATCH)]
        self._pieces = [IoVec(ctypes.addressof(buffer), size) for buffer in self._buffers]
        self._messages = (Message * BATCH)(
            *(Message(Header(pieces=ctypes.pointer(piece), piece_count=1)) for piece in self._pieces)
        )

    def send(self) -> int:
        """How many were sent."""
        return self._number(self._libc.sendmmsg(self._fd, self._messages, BATCH, 0))

    def receive(self) -> int:
        """How many came, at least one; 0 when the socket's timeout is over."""
        return self._number(self._libc.recvmmsg(self._fd, self._messages, BATCH, MSG_WAITFORONE, None))

    @staticmethod
    def _number(returned: int) -> int:
        if returned >= 0:
            return returned
        error = ctypes.get_errno()
        # A full queue on the way out, or nobody who listens any more, costs the datagram and no more.
        if error in {11, 105, 111}:  # EAGAIN, ENOBUFS, ECONNREFUSED
            return 0
        raise OSError(error, os.strerror(error))


def open_socket(address: str) -> socket.socket:
    """A UDP socket with ROOM, whose reads end after IDLE."""
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    for forced, usual in ((33, socket.SO_RCVBUF), (32, socket.SO_SNDBUF)):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
        try:
            connection.setsockopt(socket.SOL_SOCKET, forced, ROOM)
        except PermissionError:
            connection.setsockopt(socket.SOL_SOCKET, usual, ROOM)
    # Not settimeout(), with which Python calls poll(2) before each read.
    wait = struct.pack("ll", int(IDLE), int(IDLE % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
    return connection


def bound(address: str) -> socket.socket:
    """The same, listening; its port is printed."""
    connection = open_socket(address)
    connection.bind((address, 0))
    print(connection.getsockname()[1], flush=True)
    return connection


def receive(address: str, size: int) -> None:
    with bound(address) as connection:
        batch = Batch(connection, size)
        while not (total := batch.receive()):
            pass
        first = last = time.monotonic()
        while number := batch.receive():
            total += number
            last = time.monotonic()
    print(total, last - first)


def send(address: str, port: int, size: int, seconds: float) -> None:
    total = 0
    with open_socket(address) as connection:
        connection.connect((address, port))
        batch = Batch(connection, size)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            total += batch.send()
    print(total)


def echo(address: str, size: int) -> None:
    with bound(address) as connection:
        while True:
            try:
                connection.sendto(*connection.recvfrom(size))
            except BlockingIOError:
                continue


def ask(address: str, port: int, size: int, count: int) -> None:
    taken: list[int] = []
    lost = 0
    with open_socket(address) as connection:
        connection.connect((address, port))
        for number in range(WARM_UP + count):
            question = number.to_bytes(8, "big").ljust(size, b"\0")
            begun = time.perf_counter_ns()
            connection.send(question)
            try:
                while connection.recv(size) != question:
                    pass  # a late answer to one that counts as lost
                taken.append(time.perf_counter_ns() - begun)
            except BlockingIOError:
                lost += 1
                if lost > MOST_LOST:
                    break
    print(*taken[WARM_UP:])


def main(what: str, address: str, *rest: str) -> None:
    """Run one end on the processor that is named last; -1 is any."""
    *numbers, cpu = rest
    if int(cpu) >= 0:
        os.sched_setaffinity(0, {int(cpu)})
    ends = {"receive": receive, "send": send, "echo": echo, "ask": ask}
    ends[what](address, *(float(number) if "." in number else int(number) for number in numbers))  # type: ignore[operator]


if __name__ == "__main__":
    main(*sys.argv[1:])
