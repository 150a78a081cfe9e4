"""The pump in pure Python: for where the extension is not built. worker.py runs it as it runs the other one.

Two processes, as one interpreter would have the two directions take turns: this one moves TUN → UDP and
answers the daemon; a child of it moves UDP → TUN. They share the counters' memory; tables go to the child by
a socket, whose end tells each that the other is gone.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import mmap
import os
import select
import struct
import sys
import time

from flanneld_py.udp.pycounts import COUNTED, COUNTERS, DROP_REASONS, Counts
from flanneld_py.udp.pylanes import IP_MTU_DISCOVER, IP_PMTUDISC_DO, UDP_GRO, open_lanes
from flanneld_py.udp.pypacket import VNET
from flanneld_py.udp.pyreceive import Receiver
from flanneld_py.udp.pysend import Sender
from flanneld_py.udp.pytable import Table

TYPE_CHECKING = False  # without an import of typing
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["COUNTERS", "DROP_REASONS", "Pump"]

TUNGETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD = 0x800454D2, 0x400454D8, 0x400454D0
IFF_VNET_HDR = 0x4000
TUN_F_CSUM, TUN_F_TSO, TUN_F_USO = 0x01, 0x02 | 0x04, 0x20 | 0x40
UDP_SEGMENT = 103
PAUSE = 0.01
"""Seconds after a read that failed for no reason to end."""
FAILING = 3.0
"""Seconds of reads that all fail, after which another process may do better."""
GONE = {errno.EBADFD, errno.EBADF}
PARK_MS = 50
NEW_TABLE, ALIVE, PARK = b"T", b"A", b"P"
"""What the child is told; it repeats ALIVE."""
BUSY = COUNTED.index("busy-ms")


def _offload_tun(tun: int, *, tso: bool, uso: bool) -> tuple[bool, bool]:
    """Set vnet header and offloads of the TUN; those that the kernel has.

    Raises:
        OSError: it is no TUN with IFF_VNET_HDR.
    """
    try:
        flags = struct.unpack("16sH", fcntl.ioctl(tun, TUNGETIFF, bytes(40))[:18])[1]
    except OSError as error:
        raise OSError(error.errno, "TUNGETIFF (is it a TUN device, and still there?)") from error
    if not flags & IFF_VNET_HDR:
        raise OSError(errno.EINVAL, "the TUN device was opened without IFF_VNET_HDR")
    fcntl.ioctl(tun, TUNSETVNETHDRSZ, struct.pack("i", VNET.size))
    for with_tso, with_uso in ((tso, uso), (tso, False), (False, False)):
        try:
            features = TUN_F_CSUM | TUN_F_TSO * with_tso | TUN_F_USO * with_uso
            fcntl.ioctl(tun, TUNSETOFFLOAD, features)
        except OSError:
            continue
        return with_tso, with_uso
    raise OSError(errno.EINVAL, "the TUN device takes no checksum offload")


def _offload_udp(udp: _socket.socket, *, segment: bool, gro: bool) -> tuple[bool, bool]:
    """Set up the socket; which of these the kernel has."""
    udp.setsockopt(_socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    try:
        udp.setsockopt(_socket.SOL_UDP, UDP_GRO, int(gro))
    except OSError:  # before 5.0
        gro = False
    try:
        udp.getsockopt(_socket.SOL_UDP, UDP_SEGMENT)
    except OSError:  # before 4.18
        segment = False
    return segment, gro


class _Loop:
    """Batches whenever there is something to read from `data`, until something else is to be read."""

    def __init__(self, data: int, batch: Callable[[], None], counts: Counts, *others: int) -> None:
        self._data, self._batch, self._counts, self._others = data, batch, counts, others
        self._failing_since = 0.0
        self._poller = select.poll()
        for other in others:
            self._poller.register(other, select.POLLIN)

    def start(self) -> None:
        """There is a table now."""
        self._poller.register(self._data, select.POLLIN)

    def turn(self) -> int:
        """The descriptor of `others` that can be read.

        Raises:
            OSError: `data` can never be read again, or could not be for seconds.
        """
        while True:
            try:
                ready = dict(self._poller.poll())
            except OSError as error:
                self._pause(error)
                continue
            for other in self._others:
                if other in ready:
                    return other
            if (
                ready[self._data] & (select.POLLNVAL | select.POLLERR)
                and not ready[self._data] & select.POLLIN
            ):
                raise OSError(errno.EBADFD, "gone")
            try:
                self._batch()
            except OSError as error:
                if error.errno in GONE:
                    raise
                self._pause(error)
            else:
                self._failing_since = 0.0

    def _pause(self, error: OSError) -> None:
        """After a failure that may pass."""
        now = time.monotonic()
        self._counts.add("read-errors")
        self._failing_since = self._failing_since or now
        if now - self._failing_since > FAILING:
            raise error
        time.sleep(PAUSE)


class Pump:
    """See worker.RunningPump. `control` is closed in the child.

    Raises:
        OSError: the descriptors are no TUN with IFF_VNET_HDR and no UDP socket for IPv4.
    """

    def __init__(
        self, tun: int, udp: int, tso: bool, uso: bool, udp_segment: bool, udp_gro: bool, control: int
    ) -> None:
        self._socket = _socket.socket(fileno=udp)
        self._socket.setblocking(True)
        tso, uso = _offload_tun(tun, tso=tso, uso=uso)
        udp_segment, udp_gro = _offload_udp(self._socket, segment=udp_segment, gro=udp_gro)
        used = {"tso": tso, "uso": uso, "udp_segment": udp_segment, "udp_gro": udp_gro}
        self.offloads = tuple(name for name, on in used.items() if on)
        memory = memoryview(mmap.mmap(-1, 8 * len(COUNTERS))).cast("Q")
        self._counts = memory
        ways = [Counts(memory[: len(COUNTED)]), Counts(memory[len(COUNTED) :])]
        lanes = open_lanes(self._socket, gro=udp_gro)
        self._sender = Sender(tun, lanes, ways[0], udp_segment=udp_segment)
        self._channel, its = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            os.close(control)
            self._channel.close()
            receiver = Receiver(tun, self._socket, ways[1], join_tcp=tso, join_udp=uso)
            os._exit(_receive(receiver, udp, its, ways[1]))
        its.close()
        self._loop = _Loop(tun, self._sender.batch, ways[0], control, self._channel.fileno())
        self._control, self._asked_at = control, 0.0
        self._started = False

    def wait(self, control: int) -> str | None:
        """Forward until `control` can be read; or say why nothing can be forwarded."""
        while True:
            try:
                if self._loop.turn() == control:
                    return None
            except OSError as error:
                if error.errno in GONE:
                    return "the TUN device is gone"
                return f"the TUN device cannot be read: {error.strerror}"
            if not self._child_lives():
                return "the process for received packets has ended"
            self._asked_at = 0.0

    def set_table(self, table: bytes) -> None:
        """For both directions, from their next batch on."""
        self._sender.set_table(Table(table))
        fd = os.memfd_create("flannel-table", os.MFD_CLOEXEC)
        os.write(fd, table)
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))
        self._tell([NEW_TABLE], [rights])
        os.close(fd)
        if not self._started:
            self._started = True
            self._loop.start()

    def counters(self) -> Sequence[int]:
        """In the order of COUNTERS."""
        now = time.monotonic()
        if not self._asked_at:
            self._asked_at = now
            self._tell([ALIVE], [])
        values = list(self._counts)
        values[len(COUNTED) + BUSY] = int((now - self._asked_at) * 1000)
        return values

    def park(self) -> None:
        """Finish what was read, within 50 ms, and read no more."""
        self._tell([PARK], [])
        poller = select.poll()
        poller.register(self._channel.fileno(), select.POLLIN)
        while poller.poll(PARK_MS) and self._channel.recv(16):
            pass

    def _child_lives(self) -> bool:
        try:
            return bool(self._channel.recv(16))
        except ConnectionError:
            return False

    def _tell(self, message: list[bytes], attached: list[tuple[int, int, bytes]]) -> None:
        try:
            self._channel.sendmsg(message, attached, _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
        except OSError:
            return  # it ended, which wait() will see; or it hangs, which the counters show


def _receive(receiver: Receiver, udp: int, channel: _socket.socket, counts: Counts) -> int:
    """The child: until the other end of `channel` closes; the exit code."""
    loop = _Loop(udp, receiver.batch, counts, channel.fileno())
    started = False
    while True:
        try:
            loop.turn()
            flags = _socket.MSG_CMSG_CLOEXEC
            message, attached, _, _ = channel.recvmsg(16, _socket.CMSG_SPACE(4), flags)
        except OSError:
            return 1
        if message == NEW_TABLE:
            fd = int.from_bytes(attached[0][2][:4], sys.byteorder)
            receiver.set_table(Table(os.pread(fd, os.fstat(fd).st_size, 0)))
            os.close(fd)
            if not started:
                started = True
                loop.start()
        elif message == ALIVE:
            channel.send(ALIVE)
        else:
            return 0
