"""TUN → UDP in pypump.py: super-packets are cut; equal sizes to one peer leave in one send."""

from __future__ import annotations

import _socket
import errno
import os
import select
import sys
import time

from flanneld_py.udp import pypacket

TYPE_CHECKING = False  # without an import of typing
if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.udp.pycounts import Counts
    from flanneld_py.udp.pypacket import Buffer
    from flanneld_py.udp.pytable import Table

UDP_SEGMENT = 103
IP_MTU = 14
BUFFER = 65536 + 64
PACKETS, BATCH = 64, 0.01
"""Taken in one batch, and seconds after which it takes no more."""
RUN_SEGMENTS, RUN_BYTES = 64, 65507
"""Of one send."""
OUTER_HEADERS = 28
RETRY_OFFLOAD, PATH_MTU = 60.0, 1.0
"""Seconds for which a refused offload is not tried again, and the kernel is not asked for a path's MTU."""
ICMP_RATE = 100
"""Of one kind a second, and at most at once."""
REFUSES_OFFLOAD = {errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT}


def _refusal(error: OSError) -> str:
    """For which reason a packet is dropped that a lane did not take."""
    return "queue-full" if error.errno == errno.EAGAIN else "send-failed"


class Path:
    """What the kernel refused for one outer address."""

    __slots__ = ("mtu", "mtu_until", "no_segment_until")

    def __init__(self) -> None:
        self.mtu, self.mtu_until, self.no_segment_until = 0, 0.0, 0.0


class Sender:
    """TUN → UDP."""

    def __init__(
        self, tun: int, lanes: Sequence[_socket.socket], counts: Counts, *, udp_segment: bool
    ) -> None:
        self._tun, self._lanes, self._counts = tun, lanes, counts
        self._most = RUN_SEGMENTS if udp_segment else 1
        self._buffers = [memoryview(bytearray(BUFFER)) for _ in range(PACKETS)]
        self._nowait = os.RWF_NOWAIT
        self._paths: dict[int, Path] = {}
        self._icmp: dict[int, _socket.socket] = {}
        for family in (_socket.AF_INET, _socket.AF_INET6):
            try:
                self._icmp[family] = _socket.socket(family, _socket.SOCK_RAW, _socket.IPPROTO_RAW)
            except OSError:  # a kernel without IPv6
                continue
        self._tokens: dict[str, tuple[float, float]] = {}
        """Reason → how many are left, and of when; one bucket each, as a scan must not hide a narrow path."""
        self.table: Table | None = None
        self._forget_run()

    def set_table(self, table: Table) -> None:
        self.table = table
        self._paths = {}

    def batch(self) -> None:
        """All that there is, or as much as fits.

        Raises:
            OSError: the TUN cannot be read.
        """
        self._now = time.monotonic()
        try:
            for buffer in self._buffers:
                length = self._read(buffer)
                if not length:
                    break
                self._counts.add("reads")
                self._take(buffer, length)
                if time.monotonic() - self._now > BATCH:  # the daemon may be waiting for an answer
                    break
        finally:  # what is in hand points into the buffers
            self._flush()

    def _read(self, buffer: memoryview) -> int:
        try:
            return os.preadv(self._tun, [buffer], -1, self._nowait)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # kernels before 5.11
                raise
        poller = select.poll()
        poller.register(self._tun, select.POLLIN)
        return os.readv(self._tun, [buffer]) if poller.poll(0) else 0

    def _take(self, buffer: memoryview, length: int) -> None:
        if length <= pypacket.VNET.size or length == BUFFER:
            self._counts.drop("truncated" if length == BUFFER else "too-short")
            return
        packet = buffer[pypacket.VNET.size : length]
        assert self.table is not None  # noqa: S101 - forwarding begins with the first one
        reason, peer = pypacket.route(self.table, packet)
        vnet = pypacket.VNET.unpack_from(buffer)
        if reason is not None:
            self._drop(reason, 0, packet, pypacket.segments_count(packet, vnet))
            return
        path = self._paths.get(peer)
        if path is None:
            path = self._paths[peer] = Path()
        reason = self._pass_on(peer, path, vnet, packet)
        if reason is not None:
            number = pypacket.segments_count(packet, vnet) if reason == pypacket.TOO_BIG else 1
            self._drop(reason, path.mtu, packet, number)

    def _pass_on(
        self, peer: int, path: Path, vnet: tuple[int, int, int, int, int, int], packet: memoryview
    ) -> str | None:
        """A packet with a route, whole or cut; why not."""
        flags, gso_type, _, size, start, offset = vnet
        cut = None
        longest = len(packet)
        if gso_type != pypacket.GSO_NONE:
            cut = pypacket.super_headers(packet, gso_type, size)
            if cut is None or (flags & pypacket.NEEDS_CSUM and start != cut[0]):
                return "offload"
            longest = min(longest, cut[1] + size)
        narrow = path.mtu_until > self._now and longest > path.mtu
        if narrow and not pypacket.may_fragment(packet):
            return pypacket.TOO_BIG
        if not pypacket.finish(packet, flags, gso_type, start, offset):
            return "offload"
        if cut is None:
            self._push_or_fragment(peer, path, (packet,), narrow)
            return None
        self._counts.add("super-packets")
        for segment in pypacket.segments(packet, gso_type, size, *cut):
            self._push_or_fragment(peer, path, segment, narrow)
        return None

    def _push_or_fragment(self, peer: int, path: Path, pieces: Sequence[Buffer], narrow: bool) -> None:
        if narrow:
            self._send_narrow(peer, path, memoryview(bytearray(b"".join(pieces))))
        else:
            self._push(peer, path, pieces, sum(map(len, pieces)))

    # --- runs of packets of equal size to one peer ---

    def _forget_run(self) -> None:
        self._run: list[Sequence[Buffer]] = []
        self._run_peer = -1
        self._run_size = self._run_total = 0
        self._run_open = False

    def _push(self, peer: int, path: Path, pieces: Sequence[Buffer], length: int) -> None:
        most = self._most if path.no_segment_until <= self._now else 1
        if self._run and (
            not self._run_open
            or peer != self._run_peer
            or length > self._run_size
            or len(self._run) >= most
            or self._run_total + length > RUN_BYTES
        ):
            self._flush()
        if not self._run:
            self._run_peer, self._run_size = peer, length
        self._run.append(pieces)
        self._run_total += length
        self._run_open = length == self._run_size

    def _flush(self) -> None:
        if not self._run:
            return
        run, peer = self._run, self._run_peer
        control = []
        if len(run) > 1:
            size = self._run_size.to_bytes(2, sys.byteorder)
            control = [(_socket.SOL_UDP, UDP_SEGMENT, size)]
        total = self._run_total
        self._forget_run()
        try:
            self._send([piece for pieces in run for piece in pieces], peer, control, len(run), total)
        except OSError as error:
            if len(run) == 1:
                self._refused(peer, run[0], error)
            elif error.errno in REFUSES_OFFLOAD:
                self._send_singly(peer, run)
            else:
                self._counts.drop(_refusal(error), len(run))

    def _send(
        self,
        pieces: Sequence[Buffer],
        peer: int,
        control: list[tuple[int, int, bytes]],
        packets: int,
        length: int,
    ) -> None:
        assert self.table is not None  # noqa: S101 - as above
        self._counts.add("writes")
        lane = self._lanes[peer % len(self._lanes)]
        # Without waiting, like the queues of the kernel: a full one costs its own packets and no others.
        lane.sendmsg(pieces, control, _socket.MSG_DONTWAIT, self.table.target(peer))
        self._counts.add("packets", packets)
        self._counts.add("bytes", length)

    def _send_singly(self, peer: int, run: Sequence[Sequence[Buffer]]) -> None:
        self._counts.add("offload-refused")
        worked = narrow = False
        for pieces in run:
            try:
                self._send(pieces, peer, [], 1, sum(map(len, pieces)))
                worked = True
            except OSError as error:
                narrow |= error.errno == errno.EMSGSIZE
                self._refused(peer, pieces, error)
        if worked and not narrow:  # otherwise it was not the offload's fault
            self._paths.setdefault(peer, Path()).no_segment_until = self._now + RETRY_OFFLOAD

    # --- paths too narrow ---

    def _refused(self, peer: int, pieces: Sequence[Buffer], error: OSError) -> None:
        packet = memoryview(bytearray(b"".join(pieces)))
        mtu = self._ask_mtu(peer) if error.errno == errno.EMSGSIZE else 0
        if not mtu or len(packet) <= mtu:
            self._counts.drop(_refusal(error))
            return
        path = self._paths.setdefault(peer, Path())
        path.mtu, path.mtu_until = mtu, self._now + PATH_MTU
        self._send_narrow(peer, path, packet)

    def _ask_mtu(self, peer: int) -> int:
        """The inner MTU the kernel knows for a peer, or 0. Only a connected socket can be asked."""
        assert self.table is not None  # noqa: S101 - as above
        probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        try:
            probe.connect(self.table.target(peer))
            mtu = probe.getsockopt(_socket.IPPROTO_IP, IP_MTU)
        except OSError:
            return 0
        finally:
            probe.close()
        return min(mtu, 65535) - OUTER_HEADERS if mtu >= 68 + OUTER_HEADERS else 0

    def _send_narrow(self, peer: int, path: Path, packet: memoryview) -> None:
        self._flush()
        if len(packet) <= path.mtu:
            self._push(peer, path, (packet,), len(packet))
            self._flush()
            return
        if not pypacket.may_fragment(packet):
            self._drop("too-big", path.mtu, packet)
            return
        self._counts.add("fragmented")
        for header, payload in pypacket.fragments(packet, path.mtu):
            try:
                self._send((header, payload), peer, [], 1, len(header) + len(payload))
            except OSError as error:
                self._counts.drop(_refusal(error))

    def _drop(self, reason: str, mtu: int, packet: memoryview, number: int = 1) -> None:
        """`number`: of packets it stands for."""
        self._counts.drop(reason, number)
        if reason not in pypacket.ICMP_ABOUT or self.table is None:
            return
        answer = pypacket.icmp_error(self.table, reason, mtu, packet)
        if answer is None or not self._icmp_allowed(reason):
            return
        # Not through the TUN: what comes from there with an address of this host is a martian, and dropped.
        four = answer[0] >> 4 == 4
        to = answer[16:20] if four else answer[24:40]
        family = _socket.AF_INET if four else _socket.AF_INET6
        try:
            self._icmp[family].sendto(answer, _socket.MSG_DONTWAIT, (_socket.inet_ntop(family, to), 0))
        except (OSError, KeyError):
            return
        self._counts.add("icmp-errors")

    def _icmp_allowed(self, reason: str) -> bool:
        left, at = self._tokens.get(reason, (ICMP_RATE, self._now))
        left = min(left + (self._now - at) * ICMP_RATE, ICMP_RATE)
        allowed = left >= 1
        self._tokens[reason] = (left - allowed, self._now)
        return allowed
