"""The pump as the daemon sees it: a child process, started and replaced, given tables, asked for counters.

The TUN and the socket stay open here, so packets wait in their queues while there is no child. Nothing here
starts a thread; every call is bounded in time, and any thread may call.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import RLock
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.errors import FlanneldError
from flanneld_py.udp import pylanes, worker

Plane = Literal["auto", "native", "python"]

WORKER = Path(worker.__file__)
ANSWER_WITHIN = 3.0
"""Seconds; then the child is wedged, and killed."""
STUCK_MS = 3000
"""Each step of a batch takes less than a hundredth of it."""
RETRY_FIRST, RETRY_MOST = 1.0, 30.0
"""Seconds between two starts of a child that does not live."""
SETTLED = 60.0
"""Seconds after which a child's end is not counted with those before."""
CRASHES = 3
"""Ends in a row of the native pump, after which `auto` takes the other one: a packet may be what kills it."""
NATIVE_AGAIN = 3600.0
"""Seconds until `auto` tries the native one again."""

TUN_DEVICE = "/dev/net/tun"
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0001, 0x1000, 0x4000, 0x8000
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
SEND_BUFFER = 2 << 20
"""Bytes that may wait in queues of the underlay for one peer; what comes then is dropped."""
RECEIVE_BUFFER = {"native": 16 << 20, "python": 2 << 20}
"""Bytes: packets of some milliseconds, in which the child may not run.

Once a flood has filled it the kernel takes no packet of anybody until a quarter is read again (its
`udp_rmem_release`): of 16 MB ten thousand small packets, for which Python needs half a second.
"""
BUSY = ("send.busy-ms", "receive.busy-ms")


class PumpDown(FlanneldError):
    """No child forwards packets now; `Pump.tend` will start one."""


class PumpHangs(PumpDown):
    """It did not get on and was killed. Mostly the machine is to blame: another pump would fare no better."""


class Running(Struct, frozen=True):
    """A child as it said of itself when it started."""

    pid: int
    plane: str
    """native or python."""
    why: str
    """Why not native, or empty."""
    offloads: tuple[str, ...]
    """Those of worker.OFFLOADS that are in use."""


def open_tun(name: str, *, persistent: bool, new: bool = False) -> int:
    """Attach to a TUN device as a pump needs it, and make it if it is not there; the descriptor.

    A persistent one survives its last descriptor. `new`: refuse when it is there.
    /dev/net/tun: see Documentation/networking/tuntap.rst.

    Raises:
        OSError: no such driver, no right to it, another process has it, or the name is no TUN's.
    """
    tun = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | (IFF_TUN_EXCL if new else 0)
        request = struct.pack("16sH22x", name.encode(), flags)
        fcntl.ioctl(tun, TUNSETIFF, request)
        fcntl.ioctl(tun, TUNSETPERSIST, int(persistent))
    except BaseException:
        os.close(tun)
        raise
    return tun


def _lead(udp: socket.socket) -> None:
    """Let a child's own sockets with this address and port leave all packets to this one.

    The program can be set only while it is unbound, and with the option on. It is bound without that, so that
    a port in use is noticed.
    """
    with contextlib.suppress(OSError):  # then a child sends by this one alone
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        pylanes.attach(udp)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def _set_buffer(udp: socket.socket, forced: int, asked: int, size: int) -> None:
    try:
        udp.setsockopt(socket.SOL_SOCKET, forced, size)
    except PermissionError:  # as much as net.core.[rw]mem_max allows
        udp.setsockopt(socket.SOL_SOCKET, asked, size)


def open_socket(address: str, port: int) -> socket.socket:
    """The socket all peers send to.

    Raises:
        OSError: the address is not this host's, or the port is taken.
    """
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        _set_buffer(udp, SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER)
        _lead(udp)
        udp.bind((address, port))
    except BaseException:
        udp.close()
        raise
    return udp


class _Child:
    """One worker process and the socket to it."""

    def __init__(self, plane: str, tun: int, udp: int, off: Collection[str]) -> None:
        try:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise PumpDown(f"the process that forwards packets cannot be started: {error}") from error
        with its:
            fds = (tun, udp, its.fileno())
            argv = [sys.executable, "-I", "-S", str(WORKER), plane, *map(str, fds), ",".join(sorted(off))]
            try:
                self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=fds, process_group=0)
            except OSError as error:
                ours.close()
                raise PumpDown(f"the process that forwards packets cannot be started: {error}") from error
        self._control = ours
        self._number = 0
        self.started = time.monotonic()
        try:
            said = self._answer(worker.HELLO, 0, self.started + ANSWER_WITHIN).decode().split("\n")
        except PumpDown:
            self.end()
            raise
        runs, why, offloads, names = said
        shared = socket.socket(fileno=udp)
        _set_buffer(shared, SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER[runs])
        shared.detach()
        self.running = Running(self.process.pid, runs, why, tuple(offloads.split()))
        self.counted: dict[str, int] = dict.fromkeys(names.split(), 0)

    def _answer(self, verb: bytes, number: int, deadline: float) -> bytes:
        closed = False
        while True:
            try:
                self._control.settimeout(max(deadline - time.monotonic(), 0.001))
                found, its_number, body, _ = worker.receive(self._control)
            except TimeoutError:
                raise PumpHangs(f"pid {self.process.pid} did not answer within {ANSWER_WITHIN:g} s") from None
            except (worker.ControlClosed, OSError):
                if closed:
                    raise PumpDown(f"pid {self.process.pid} {self._end_of_process()}") from None
                closed = True  # once more: a reset comes before what the child said last
                continue
            if found == worker.FAILED:
                raise PumpDown(body.decode(errors="replace"))
            if (found, its_number) == (worker.BAD, number):
                raise ValueError(body.decode(errors="replace"))
            if (found, its_number) == (verb, number):
                return body

    def _end_of_process(self) -> str:
        try:
            code = self.process.wait(ANSWER_WITHIN)
        except subprocess.TimeoutExpired:
            return "closed its control socket"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    def ask(self, verb: bytes, fd: int | None = None) -> bytes:
        """The answer to one request.

        Raises:
            PumpDown: it did not come in time, or the child has ended.
            ValueError: it does not accept what it was given.
        """
        deadline = time.monotonic() + ANSWER_WITHIN
        self._number += 1
        try:
            self._control.settimeout(ANSWER_WITHIN)
            worker.send(self._control, verb, self._number, fd=fd)
        except TimeoutError:
            raise PumpHangs(f"pid {self.process.pid} reads no requests") from None
        except OSError:  # it may have said why
            return self._answer(worker.DONE, self._number, deadline)
        return self._answer(worker.DONE, self._number, deadline)

    def set_table(self, table: bytes) -> None:
        """Raises as `ask` does, and OSError when there is no descriptor or memory to hand it over in."""
        fd = os.memfd_create("flannel-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for done in range(0, len(table), 1 << 30):
                os.write(fd, table[done : done + (1 << 30)])
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            self.ask(worker.TABLE, fd)
        finally:
            os.close(fd)

    def count(self) -> dict[str, int]:
        values = self.ask(worker.COUNTERS)
        self.counted = dict(zip(self.counted, struct.unpack(f"<{len(values) // 8}Q", values), strict=True))
        if stuck := [name.partition(".")[0] for name in BUSY if self.counted[name] > STUCK_MS]:
            raise PumpHangs(f"pid {self.process.pid} hangs in {' and '.join(stuck)}")
        return self.counted

    def end(self, *, gently: bool = False) -> None:
        """Gone when this returns, and what it had in hand gone through if it was asked gently and could."""
        if gently:
            with contextlib.suppress(PumpDown, ValueError):
                self.ask(worker.STOP)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the python pump is two processes
        self.process.wait()
        self._control.close()


class Pump:
    """Packets between `tun` and `udp`, by whichever child lives.

    Args:
        tun: as of open_tun. It and `udp` stay the caller's, open until after `close`.
        udp: a UDP socket for IPv4.
        plane: auto is native where it can be loaded and does not crash, else python.
        off: those of worker.OFFLOADS not to be used.
    """

    def __init__(self, tun: int, udp: int, plane: Plane = "auto", off: Collection[str] = ()) -> None:
        self._tun, self._udp, self._plane, self._off = tun, udp, plane, frozenset(off)
        self._lock = RLock()
        self._child: _Child | None = None
        self._table: bytes | None = None
        self._before: Counter[str] = Counter()
        self._ended: list[float] = []
        """When children ended that were not asked to."""
        self._crashed: list[float] = []
        """When they did by themselves."""
        self._cause = ""
        """Why the last of them did; empty while one lives."""
        self._given_up = ""
        """Why `auto` does not run the native one, though there is one."""
        self._native_at = 0.0
        """When to try it again."""
        self._restarts = 0

    def start(self) -> Running:
        """A new child, in the place of the one there may be, which lets go first: no packet is lost.

        Raises:
            PumpDown: it does not start. The old one goes on if it lives.
        """
        with self._lock:
            child = _Child("python" if self._given_up else self._plane, self._tun, self._udp, self._off)
            if self._given_up:
                child.running = replace(child.running, why=self._given_up)
            self._put_aside(gently=True)
            self._child, self._cause = child, ""
            if self._table is not None:
                try:
                    self._give(child, self._table)
                except OSError as error:
                    down = PumpDown(f"pid {child.process.pid} cannot be given its table: {error}")
                    self._lost(down)
                    raise down from error
            return child.running

    def set_table(self, table: bytes) -> None:
        """In force when this returns, and in every child to come; forwarding begins with the first one.

        Raises:
            ValueError: there is something wrong with it; the one before stays.
            OSError: it could not be handed over, for want of descriptors or memory; the one before stays.
            PumpDown: no child now. The next one gets it.
        """
        with self._lock:
            if self._child is None:
                self._table = table
                raise PumpDown("no process forwards packets now")
            before, self._table = self._table, table
            try:
                self._give(self._child, table)
            except (OSError, ValueError):
                self._table = before
                raise

    def counters(self) -> dict[str, int]:
        """Of all children together, as of the latest answer.

        Raises:
            PumpDown: no child now, or it had to be killed just now.
        """
        with self._lock:
            if self._child is None:
                raise PumpDown("no process forwards packets now")
            try:
                latest = self._child.count()
            except PumpDown as down:
                self._lost(down)
                raise
            return self._with_earlier(latest)

    def tend(self) -> str | None:
        """Call it every second: looks after the child, and starts one where there is none.

        Returns what was wrong and is now mended; None while all is well.

        Raises:
            PumpDown: no child, and it is not time to start another, or it does not start.
        """
        with self._lock:
            if self._child is not None:
                try:
                    self._child.count()
                except PumpDown as down:
                    self._lost(down)
                else:
                    self._try_native_again()
                    return None
            wrong, delay = self._cause or "no process forwards packets", self._delay()
            if delay and time.monotonic() < self._ended[-1] + delay:
                raise PumpDown(wrong)
            self._restarts += 1
            try:
                self.start()
            except PumpDown as down:
                self._note_end(down)
                raise
            return wrong

    @property
    def running(self) -> Running | None:
        """The child, if there is one."""
        child = self._child
        return None if child is None else child.running

    @property
    def restarts(self) -> int:
        """How often `tend` had to start one."""
        return self._restarts

    def close(self) -> None:
        """End the child, after what it has in hand."""
        with self._lock:
            self._put_aside(gently=True)

    def count_on(self, before: Pump) -> None:
        """Go on with the counters of one that was closed, in whose place this one is."""
        with self._lock:
            self._before.update(before._before)

    def _delay(self) -> float:
        """Seconds from the last end to the next start: none after a long life, then more and more."""
        recent = _of_late(self._ended)
        return 0.0 if recent < 2 else min(RETRY_FIRST * 2.0 ** (recent - 2), RETRY_MOST)

    def _try_native_again(self) -> None:
        if self._given_up and time.monotonic() >= self._native_at:
            self._given_up = ""
            with contextlib.suppress(PumpDown):  # the one there is goes on
                self.start()

    def _give(self, child: _Child, table: bytes) -> None:
        try:
            child.set_table(table)
        except PumpDown as down:
            self._lost(down)
            raise

    def _lost(self, down: PumpDown) -> None:
        self._note_end(down)
        self._put_aside(gently=False)

    def _note_end(self, down: PumpDown) -> None:
        self._ended = [*self._ended[-9:], time.monotonic()]
        if not isinstance(down, PumpHangs):
            self._crashed = [*self._crashed[-9:], time.monotonic()]
        self._cause = str(down)
        if self._plane == "auto" and not self._given_up and _of_late(self._crashed) >= CRASHES:
            self._given_up = f"native ended {CRASHES} times within a minute, last: {down}"
            self._native_at = time.monotonic() + NATIVE_AGAIN

    def _put_aside(self, *, gently: bool) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if gently:
            with contextlib.suppress(PumpDown):
                child.count()
        child.end(gently=gently)
        self._before.update(child.counted)

    def _with_earlier(self, latest: Mapping[str, int]) -> dict[str, int]:
        return {name: value + (0 if name in BUSY else self._before[name]) for name, value in latest.items()}


def _of_late(ends: Collection[float]) -> int:
    """How many of them are recent."""
    return sum(time.monotonic() - ended < SETTLED for ended in ends)
