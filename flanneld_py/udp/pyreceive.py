"""UDP → TUN in pypump.py: datagrams are checked, and what belongs together is joined into super-packets."""

from __future__ import annotations

import _socket
import errno
import os
import sys
import time

from flanneld_py.udp import pypacket
from flanneld_py.udp.pyjoin import Joiner

TYPE_CHECKING = False  # without an import of typing
if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.udp.pycounts import Counts
    from flanneld_py.udp.pyjoin import Entry
    from flanneld_py.udp.pytable import Table

UDP_GRO = 104
CONTROL = _socket.CMSG_SPACE(4)
BUFFER = 65536 + 64
MESSAGES = 8
"""Taken in one batch, of up to 64 KB."""
RETRY_OFFLOAD = 60.0
"""Seconds for which super-packets the TUN refused are not tried again."""


class Receiver:
    """UDP → TUN."""

    def __init__(
        self, tun: int, udp: _socket.socket, counts: Counts, *, join_tcp: bool, join_udp: bool
    ) -> None:
        self._tun, self._udp, self._counts = tun, udp, counts
        self._joins = {pypacket.TCP: join_tcp, pypacket.UDP: join_udp}
        self._off_until = dict.fromkeys(self._joins, 0.0)
        self._buffers = [memoryview(bytearray(BUFFER)) for _ in range(MESSAGES)]
        self.table: Table | None = None

    def set_table(self, table: Table) -> None:
        self.table = table

    def batch(self) -> None:
        """All that there is, or as much as fits.

        Raises:
            OSError: the socket cannot be read.
        """
        now = time.monotonic()
        joins = {protocol: on and self._off_until[protocol] <= now for protocol, on in self._joins.items()}
        joiner = Joiner(tcp=joins[pypacket.TCP], udp=joins[pypacket.UDP])
        try:
            for buffer in self._buffers:
                received = self._udp.recvmsg_into([buffer], CONTROL, _socket.MSG_DONTWAIT)
                self._counts.add("reads")
                self._accept(joiner, buffer, *received)
        except BlockingIOError:
            pass
        finally:  # an error of the socket is none of what it gave before
            for entry in joiner.entries:
                self._write(entry, now)

    def _accept(
        self,
        joiner: Joiner,
        buffer: memoryview,
        length: int,
        control: Sequence[tuple[int, int, bytes]],
        flags: int,
        source: tuple[str, int],
    ) -> None:
        if flags & _socket.MSG_TRUNC:
            self._counts.drop("truncated")
            return
        assert self.table is not None  # noqa: S101 - forwarding begins with the first one
        size = next(
            (int.from_bytes(data[:4], sys.byteorder) for _, kind, data in control if kind == UDP_GRO), 0
        )
        sender = self.table.sender(_socket.inet_aton(source[0]))
        entry: Entry | None = None
        for at in range(0, max(length, 1), size or max(length, 1)):  # an empty datagram is one as well
            packet = buffer[at : min(at + size, length) if size else length]
            if entry is None or not entry.extend(packet):
                reason = pypacket.accept(self.table, sender, packet)
                if reason is not None:
                    self._counts.drop(reason)
                    continue
                entry = joiner.add(packet)

    def _write(self, entry: Entry, now: float) -> None:
        self._counts.add("writes")
        try:
            os.writev(self._tun, entry.super_packet())
        except OSError as error:
            if entry.count == 1 or error.errno != errno.EINVAL:
                self._counts.drop("write-failed", entry.count)
                return
            self._off_until[entry.protocol] = now + RETRY_OFFLOAD
            self._counts.add("offload-refused")
            for packet in entry.whole:
                self._write_plain(packet)
            return
        self._counts.add("packets", entry.count)
        self._counts.add("bytes", entry.payload + entry.header * entry.count)
        self._counts.add("super-packets", entry.count > 1)

    def _write_plain(self, packet: memoryview) -> None:
        self._counts.add("writes")
        try:
            os.writev(self._tun, (pypacket.PLAIN, packet))
        except OSError:
            self._counts.drop("write-failed")
            return
        self._counts.add("packets")
        self._counts.add("bytes", len(packet))
