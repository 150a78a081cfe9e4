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

DRAIN_LIMIT = 100_000
"""Datagrams read before what was heard is told, lest a storm silence us."""
MOST_FAILURES = 10
"""In a row, after which a socket is of no more use."""


class Subscription(ABC, Generic[Heard_co]):
    """The notifications that come to one socket, folded into one value for each `wait`.

    One thread calls `wait`; any thread may call `interrupt` and `close`.
    """

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
        self._poll = select.poll()
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
        self._poll.register(self._wake, select.POLLIN)

    def wait(self, timeout: float | None) -> Heard_co | None:
        """Wait until something concerns us; None after `timeout` seconds, `interrupt` or `close`.

        Raises:
            KernelError: the socket is of no more use.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._waiting:
            while not self._closed:
                left = None if deadline is None else max(0, math.ceil((deadline - time.monotonic()) * 1000))
                ready = {fd for fd, _ in self._poll.poll(left)}
                interrupted = self._wake in ready
                if interrupted:
                    os.eventfd_read(self._wake)
                heard = self._drain() if not self._closed else None
                if heard is not None or interrupted or not ready or left == 0:
                    return heard
        return None

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
        """Those that are pending; None in place of some that were lost."""
        if self._socket is None:
            return
        for _ in range(DRAIN_LIMIT):
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
                yield None
            else:
                self._failures = 0
                yield datagram
