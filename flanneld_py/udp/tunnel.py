"""Driver of the tables pumps and tunnel: what carries packets between TUN and peers, and who these are.

One pump at most, as one prefix has one TUN. The reconciler's thread calls what a Driver has, another one
`look`, which also replaces a child that died or hangs.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from threading import RLock
from typing import Any, Protocol

from msgspec import Struct, field

from flanneld_py.addresses import IPNetwork, PerFamily
from flanneld_py.datapath import Endpoint, PumpSettings
from flanneld_py.errors import FlanneldError
from flanneld_py.model import Op, Outcome, Scope, State, Table
from flanneld_py.udp import kept, remembered, resume
from flanneld_py.udp.pump import Pump, PumpDown, Running, open_socket
from flanneld_py.udp.table import Here, Peer, SourceCheck, pack
from flanneld_py.udp.tuns import Tuns, name_of


class Keeper(Protocol):
    """Keeps descriptors for the next process, where there is somebody who does."""

    def keep(self, name: str, fd: int) -> None:
        """In the place of one kept under that name before."""

    def forget(self, name: str) -> None:
        """Keep none under that name."""


class Look(Struct, frozen=True):
    """The data plane at one moment."""

    device: str
    running: Running | None
    """None: no packets are forwarded."""
    restarts: int
    counters: Mapping[str, int] = field(default_factory=dict)
    """As pump.h names them."""
    wrong: str = ""
    """Why no packets are forwarded."""
    mended: tuple[str, ...] = ()
    """What was wrong since the last look, and is no more."""
    settings: PumpSettings | None = None
    """What is asked of it."""


class _Work(Struct):
    """A pump and what it works with."""

    device: str
    settings: PumpSettings
    pump: Pump
    tun: int
    udp: socket.socket


class Tunnel:
    """Offers nothing by itself.

    Args:
        prefix: the etcd prefix, as a pump that was kept may have been another daemon's.
        tuns: where the device's descriptor is.
        keeper: keeps descriptors over a restart.
    """

    tables: tuple[Table, ...] = ("pumps", "tunnel")

    def __init__(self, prefix: str, tuns: Tuns, keeper: Keeper) -> None:
        self._prefix, self._tuns, self._keeper = prefix, tuns, keeper
        self.changed: Callable[[bytes], None] = lambda _: None
        """Called with what the next process is to work with, in any thread; empty: there is no pump."""
        self._lock = RLock()
        self._work: _Work | None = None
        self._rows: dict[IPNetwork, Endpoint] = {}
        self._memory = -1
        """The memfd that is kept; -1: none yet."""
        self._spare: socket.socket | None = None
        """One that was kept, and no pump has: it holds its port until it is used or closed."""
        self._mended: list[str] = []
        self._wrong = ""

    # --- at the start -----------------------------------------------------------------------------

    def adopt(self, resumed: resume.Resumed) -> bool:
        """Take over a pump that was started before; whether it is ours, and has what it was made for."""
        known = remembered.parse(resumed.cut)
        name = name_of(resumed.tun)
        if known is None or (known.prefix, known.device) != (self._prefix, name):
            return False
        if not _stands_at(resumed.udp, known.settings):
            return False
        self._memory = resumed.memory
        self._tuns.adopt(name, resumed.tun)
        self._work = _Work(name, known.settings, resumed.pump, resumed.tun, resumed.udp)
        self._rows = known.rows
        self.changed(remembered.render(self._prefix, name, known.settings, resumed.cut.table))
        return True

    def salvage(self, fds: Mapping[str, int], ours: Collection[str]) -> None:
        """Keep what may be of use of kept descriptors that are no whole, and close the others.

        Args:
            fds: by the name under which they were kept.
            ours: the names of our devices.
        """
        for name, fd in fds.items():
            if name == kept.TUN and (device := name_of(fd)) in ours:
                self._tuns.adopt(device, fd)  # it takes one reader
                continue
            if name == kept.SOCKET:
                with suppress(OSError):
                    self._spare = socket.socket(fileno=fd)
                    continue
            os.close(fd)
            self._keeper.forget(name)

    def recall(self, whole: bytes, ours: Collection[str]) -> bool:
        """The same with nothing but a file, where one of our devices stands and nobody reads it.

        Args:
            whole: as `changed` got it.
            ours: the names of our devices.

        Returns: whether it succeeded.
        """
        found = resume.cut(whole)
        known = remembered.parse(found) if found is not None else None
        if found is None or known is None or known.prefix != self._prefix or known.device not in ours:
            return False
        with suppress(OSError, FlanneldError, ValueError):
            tun = self._tuns.attach(known.device)
            udp = self._open(known.settings)
            started = resume.start(tun, udp, found)
            self._work = _Work(known.device, known.settings, started.pump, tun, udp)
            self._rows = known.rows
            self._keep(self._work)
            self._remember(self._work, found.table)
            return True
        return False

    # --- Driver -----------------------------------------------------------------------------------

    def observe(self, scope: Scope) -> State:  # noqa: ARG002 - see Driver
        with self._lock:
            if self._work is None:
                return State()
            if self._tuns.attached(self._work.device) != self._work.tun:
                self._end()  # the device was deleted, perhaps made anew
                return State()
            pumps = {self._work.device: self._work.settings} if self._tend() else {}
            tunnel = {(self._work.device, subnet): end for subnet, end in self._rows.items()}
            return State(pumps=pumps, tunnel=tunnel)

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        with self._lock:
            if any(op.table == "pumps" for op in ops):
                return [Outcome(op, self._apply_pump(op)) for op in ops]
            rows = dict(self._rows)
            for op in ops:
                _, subnet = op.key
                if op.verb == "set":
                    rows[subnet] = op.value
                else:
                    rows.pop(subnet, None)
            error = self._give(rows)
            return [Outcome(op, error) for op in ops]

    def look(self) -> Look | None:
        """The data plane now, mended if that was needed; None: there is none."""
        with self._lock:
            work = self._work
            if work is None:
                return None
            counters: Mapping[str, int] = {}
            if self._tuns.attached(work.device) == work.tun and self._tend():
                with suppress(PumpDown):
                    counters = work.pump.counters()
            mended, self._mended = tuple(self._mended), []
            running = None if self._wrong else work.pump.running
            return Look(
                work.device, running, work.pump.restarts, counters, self._wrong, mended, work.settings
            )

    # --- the rest ---------------------------------------------------------------------------------

    def _tend(self) -> bool:
        """Whether a child lives, after one was put in the place of one that did not."""
        if self._work is None:
            return False
        try:
            mended = self._work.pump.tend()
        except PumpDown as down:
            self._wrong = str(down)
            return False
        if mended or self._wrong:
            self._mended.append(mended or self._wrong)
        self._wrong = ""
        return True

    def _apply_pump(self, op: Op) -> str | None:
        if op.verb == "del":
            if self._work is not None and self._work.device == op.key:
                self._end()
            return None
        try:
            self._work_with(op.key, op.value)
        except (OSError, PumpDown) as error:
            if self._work is None:
                # What is kept for us, and we did not get or do not want, may be what is in the way.
                self._close_spare()
                self._forget()
            return _explain(op.key, op.value, error)
        return self._give(self._rows)

    def _work_with(self, device: str, settings: PumpSettings) -> None:
        """Have a pump for these settings; the one there is goes on when that fails.

        Raises:
            OSError: the device or the socket's address cannot be had.
            PumpDown: it does not start.
        """
        old = self._work
        tun = self._tuns.attach(device)
        if old is None or old.tun != tun or _place(old.settings) != _place(settings):
            udp = self._open(settings)
        else:
            udp = old.udp
        if old is not None and (old.tun, old.udp, old.settings.plane) == (tun, udp, settings.plane):
            old.settings = settings
            if not self._tend():
                raise PumpDown(self._wrong)
            return
        if old is not None and old.device != device:
            self._rows = {}
        work = _Work(device, settings, Pump(tun, udp.fileno(), resume.tried(settings.plane)), tun, udp)
        try:
            self._fill(work, self._rows)
            work.pump.start()
        except BaseException:
            if old is None or udp is not old.udp:
                udp.close()
            raise
        self._work, self._wrong = work, ""
        if old is not None:
            old.pump.close()
            work.pump.count_on(old.pump)
            if old.udp is not udp:
                old.udp.close()
        self._keep(work)

    def _give(self, rows: dict[IPNetwork, Endpoint]) -> str | None:
        """Why the rows are not in force, if so. A child that is down gets them when it is started."""
        if self._work is None:
            return "there is no data plane"
        try:
            table = self._fill(self._work, rows)
        except ValueError as error:
            return f"the table of the data plane is not accepted: {error}"
        except OSError as error:
            return f"the table of the data plane cannot be handed over: {error.strerror}"
        self._rows = rows
        self._remember(self._work, table)
        return None

    def _fill(self, work: _Work, rows: Mapping[IPNetwork, Endpoint]) -> bytes:
        table = packed(work.settings, rows)
        with suppress(PumpDown):
            work.pump.set_table(table)
        return table

    def _open(self, settings: PumpSettings) -> socket.socket:
        """The socket that was kept, where it is the right one; else a new one.

        Raises:
            OSError: see open_socket.
        """
        spare = self._spare
        if spare is not None and _stands_at(spare, settings):
            self._spare = None
            return spare
        return open_socket(str(settings.address), settings.port)

    def _close_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def _keep(self, work: _Work) -> None:
        self._close_spare()
        self._keeper.keep(kept.TUN, work.tun)
        self._keeper.keep(kept.SOCKET, work.udp.fileno())

    def _remember(self, work: _Work, table: bytes) -> None:
        whole = remembered.render(self._prefix, work.device, work.settings, table)
        self.changed(whole)
        with suppress(OSError):
            if self._memory < 0:
                self._memory = os.memfd_create(kept.TABLE, os.MFD_CLOEXEC)
                self._keeper.keep(kept.TABLE, self._memory)
            os.pwrite(self._memory, whole, 0)
            os.ftruncate(self._memory, len(whole))

    def _end(self) -> None:
        work, self._work, self._rows, self._wrong = self._work, None, {}, ""
        if work is None:
            return
        work.pump.close()
        work.udp.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        self._forget()
        self.changed(b"")

    def _forget(self) -> None:
        for name in kept.NAMES:
            self._keeper.forget(name)


def packed(settings: PumpSettings, rows: Mapping[IPNetwork, Endpoint]) -> bytes:
    """The table as the pump takes it.

    Raises:
        ValueError: an MTU, port or address that no table can hold.
    """
    bases: dict[Any, Any] = {family: net.network_address for family, net in settings.subnets.items()}
    here = Here(
        subnets=settings.subnets,
        addresses=PerFamily(bases.get(4), bases.get(6)),
        networks=settings.networks,
        mtu=settings.mtu,
        source_check=SourceCheck[settings.source_check.upper()],
    )
    return pack(here, (Peer(end.address, (net,), end.port, end.ipv6) for net, end in rows.items()))


def _place(settings: PumpSettings) -> tuple[object, int]:
    return settings.address, settings.port


def _stands_at(udp: socket.socket, settings: PumpSettings) -> bool:
    """Whether it is the socket for these: who kept it may have missed the latest one."""
    try:
        here = udp.family, udp.type, udp.getsockname()
    except OSError:
        return False
    return here == (socket.AF_INET, socket.SOCK_DGRAM, (str(settings.address), settings.port))


def _explain(device: str, settings: PumpSettings, error: OSError | PumpDown) -> str:
    if isinstance(error, PumpDown):
        return str(error)
    if error.errno == errno.EADDRINUSE:
        return (
            f"UDP port {settings.port} of {settings.address} is used by another program, such as a flannel "
            f"that still runs: stop that, or set another Backend.Port for all hosts; of two flanneld-py on a "
            f"host each needs its own"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{settings.address} is no address of this host any more"
    if error.errno == errno.EBUSY:
        return f"{device} is used by another program: stop that"
    return f"cannot use {device}: {error.strerror}"
