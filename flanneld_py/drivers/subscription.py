"""Waiting for what the kernel says of its own accord on a netlink socket, until somebody wants otherwise."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from flanneld_py.drivers.netlink import NETLINK_ADD_MEMBERSHIP, RECEIVE_SIZE, SOL_NETLINK, failure
from flanneld_py.errors import KernelError

Heard_co = TypeVar("Heard_co", covariant=True)

READ_FOR, AT_A_TIME = 0.2, 250
"""Seconds of CPU, asked for after so many datagrams: then what was heard is told, lest a storm silence us."""
DRAIN_LIMIT = 100_000
"""Datagrams that are thrown away at a time after some were lost."""
MOST_FAILURES = 10
"""In a row, after which a socket is of no more use."""
SHORTEST_REST = 0.005
"""Seconds: what is owed is gathered up to that, so that single events are heard at once."""


class Subscription(ABC, Generic[Heard_co]):
    """The notifications that come to one socket, folded into one value for each `wait`.

    One thread calls `wait`; any thread may call `interrupt` and `close`.
    """

    REST = 0
    """Times as long as it took to read, nothing is read, lest a flood take a core; 0: its user rests."""

    def __init__(self, sock: socket.socket | None, groups: Iterable[int]) -> None:
        """Join the groups.

        Args:
            sock: a netlink socket, which is closed with this; None: nothing will ever be heard.
            groups: by number.

        Raises:
            KernelError: not permitted.
        """
        self._socket = sock
        self._waiting = threading.Lock()
        self._waking = threading.Lock()
        self._closed = False
        self._failures = 0
        """Of receiving, in a row."""
        self._rested = 0.0
        """When as much rest as is owed will be over, by the monotonic clock."""
        self._poll, self._rest = select.poll(), select.poll()
        if sock is not None:
            try:
                for group in groups:
                    sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
            except OSError as error:
                sock.close()
                raise KernelError(
                    f"cannot listen to the kernel: {failure(error.errno or 0).reason}"
                ) from error
            self._poll.register(sock, select.POLLIN)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for poll in (self._poll, self._rest):
            poll.register(self._wake, select.POLLIN)

    def wait(self, timeout: float | None) -> Heard_co | None:
        """Wait until something concerns us; None after `timeout` seconds, `interrupt` or `close`.

        Raises:
            KernelError: the socket is of no more use.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._waiting:
            while not self._closed:
                now = time.monotonic()
                rests = self._rested - now > SHORTEST_REST
                left = None if deadline is None else max(0, math.ceil((deadline - now) * 1000))
                if rests:
                    owed = math.ceil((self._rested - now) * 1000)
                    ready = self._rest.poll(owed if left is None else min(owed, left))
                else:
                    ready = self._poll.poll(left)
                interrupted = any(fd == self._wake for fd, _ in ready)
                if interrupted:
                    os.eventfd_read(self._wake)
                if rests and not interrupted and left != 0:
                    continue
                heard = self._read() if not self._closed else None
                if heard is not None or interrupted or not ready or left == 0:
                    return heard
        return None

    def _read(self) -> Heard_co | None:
        """What is pending, for which a rest is owed."""
        began = time.thread_time()
        heard = self._drain()
        now = time.monotonic()
        owed = max(self._rested - now, 0) + self.REST * (time.thread_time() - began)
        self._rested = now + min(owed, self.REST * READ_FOR)
        return heard

    def interrupt(self) -> None:
        """Make a `wait` return at once, or the next one if none is under way."""
        with self._waking:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End a `wait` under way and give the sockets back."""
        with self._waking:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        with self._waiting:
            if self._socket is not None:
                self._socket.close()
            os.close(self._wake)

    @abstractmethod
    def _drain(self) -> Heard_co | None:
        """Read all that is pending; None when nothing of it concerns us."""

    def _datagrams(self) -> Iterator[bytes | None]:
        """Those that are pending; None in place of some that were lost.

        After a loss it is all of them, as nobody needs to understand the rest.
        """
        if self._socket is None:
            return
        until, all_of_it = time.thread_time() + READ_FOR, not self.REST
        for number in range(1, DRAIN_LIMIT):
            if number % AT_A_TIME == 0 and not all_of_it and time.thread_time() > until:
                return
            try:
                datagram = self._socket.recv(RECEIVE_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._failures = 0
                return
            except OSError as error:
                # Any one failure may have cost events; only the commonest is known to pass.
                self._failures += error.errno != errno.ENOBUFS
                if self._failures > MOST_FAILURES:
                    raise KernelError(f"cannot listen to the kernel: {error.strerror}") from error
                all_of_it = True
                yield None
            else:
                self._failures = 0
                yield datagram
