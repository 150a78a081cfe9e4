"""The process that forwards packets: a crash of it costs some packets and not the daemon, nor vice versa.

It is started by pump.py as `python -I -S worker.py PLANE TUN UDP CONTROL OFF`, where PLANE is auto, native or
python, then three inherited descriptors, and OFF the offloads not to be used, joined by commas. It imports
next to nothing, as packets wait meanwhile; -S leaves it without site-packages but for the folder it lies in.

Over CONTROL (SOCK_SEQPACKET) go messages of a verb of four bytes, a u32 that an answer repeats, and a body:

    TABL  a memfd with the packed table is attached; the first one starts the forwarding
          -> DONE, or BAD! with the reason, and the old table stays
    STAT  -> DONE with a u64 for each counter, in the order of the names in HELO
    STOP  -> DONE once the packets in hand are through; then the process ends
    HELO  to the daemon, first of all: plane, why not native, offloads in use, names of counters; a line each
    FAIL  to the daemon: why no packets can be forwarded, as when the device was deleted; the process ends

When the daemon's end of CONTROL closes, the process ends as well.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum, 5 ms
import _socket
import os
import sys

TYPE_CHECKING = False  # without an import of typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class RunningPump(Protocol):
        """What _pump.Pump and pypump.Pump have in common."""

        @property
        def offloads(self) -> Sequence[str]:
            """Those of OFFLOADS that are in use."""

        def wait(self, control: int) -> str | None:
            """Forward until `control` can be read; or say why nothing can be forwarded."""

        def set_table(self, table: bytes) -> None:
            """From the next batch on; ValueError when there is anything wrong with it."""

        def counters(self) -> Sequence[int]:
            """In the order of COUNTERS."""

        def park(self) -> None:
            """Finish what was read, within 50 ms, and read no more."""


TABLE, COUNTERS, STOP, DONE, BAD, HELLO, FAILED = (
    b"TABL",
    b"STAT",
    b"STOP",
    b"DONE",
    b"BAD!",
    b"HELO",
    b"FAIL",
)
HEAD = 8
"""Bytes before the body of a message: verb and number."""
LONGEST = 1 << 16
"""Bytes of a message; the table does not travel in one."""
COMM = "flanneld-pump"
"""At most 15 bytes (TASK_COMM_LEN of linux/sched.h)."""
NOT_LOADED = "the compiled extension"
"""How it begins, why not native, when that is not there or does not fit."""
PLANES = ("auto", "native", "python")
OFFLOADS = ("tso", "uso", "udp_segment", "udp_gro")


class ControlClosed(Exception):
    """The other end is gone."""


def send(control: _socket.socket, verb: bytes, number: int, body: bytes = b"", fd: int | None = None) -> None:
    """One message; `fd` goes with it.

    Raises:
        OSError: BrokenPipeError when the other end is gone, TimeoutError when it does not read.
    """
    attached = [] if fd is None else [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
    control.sendmsg([verb, number.to_bytes(4, "little"), body], attached, _socket.MSG_NOSIGNAL)


def receive(control: _socket.socket) -> tuple[bytes, int, bytes, int | None]:
    """Verb, number, body, attached descriptor.

    Raises:
        ControlClosed: the other end is gone.
        TimeoutError: the socket has a timeout, and it passed.
    """
    flags = _socket.MSG_CMSG_CLOEXEC
    try:
        message, attached, _, _ = control.recvmsg(LONGEST, _socket.CMSG_SPACE(4), flags)
    except ConnectionError as error:
        raise ControlClosed from error
    if len(message) < HEAD:
        raise ControlClosed
    fds = [
        int.from_bytes(data[:4], sys.byteorder) for _, kind, data in attached if kind == _socket.SCM_RIGHTS
    ]
    return message[:4], int.from_bytes(message[4:HEAD], "little"), message[HEAD:], fds[0] if fds else None


def _content(fd: int | None) -> bytes:
    if fd is None:
        raise ValueError("no table is attached")
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    return data


def choose(
    plane: str, tun: int, udp: int, control: int, off: Sequence[str]
) -> tuple[RunningPump, str, str, str]:
    """The pump, which one it is, why it is not the native one, and the names of its counters.

    Raises:
        ImportError: the native one is demanded and cannot be loaded.
        OSError: these descriptors are not what they should be.
    """
    tso, uso, udp_segment, udp_gro = (name not in off for name in OFFLOADS)
    why = "python was asked for"
    if plane != "python":
        try:
            import flanneld_py.udp._pump as _pump  # noqa: PLC0415, PLR0402 - it may be missing, and is told so
        except ModuleNotFoundError:
            why = f"{NOT_LOADED} is not installed"
        except ImportError as error:
            why = f"{NOT_LOADED} cannot be loaded: {error}"
        else:
            return (
                _pump.Pump(tun, udp, tso, uso, udp_segment, udp_gro),
                "native",
                "",
                " ".join(_pump.COUNTERS),
            )
        if plane == "native":
            raise ImportError(why)
    from flanneld_py.udp import pypump  # noqa: PLC0415 - 10 ms, mostly not needed

    pump = pypump.Pump(tun, udp, tso, uso, udp_segment, udp_gro, control)
    return pump, "python", why, " ".join(pypump.COUNTERS)


def obey(pump: RunningPump, control: _socket.socket) -> None:
    """Read one request and answer it.

    Raises:
        ControlClosed: there will be no more.
    """
    verb, number, _, fd = receive(control)
    if verb == TABLE:
        try:
            pump.set_table(_content(fd))
        except ValueError as error:
            send(control, BAD, number, str(error).encode())
        else:
            send(control, DONE, number)
    elif verb == COUNTERS:
        send(control, DONE, number, b"".join(count.to_bytes(8, "little") for count in pump.counters()))
    else:
        pump.park()
        send(control, DONE, number)
        raise ControlClosed


def _name_process() -> None:
    """For ps and top; see /proc/PID/comm in proc(5)."""
    try:
        with open("/proc/self/comm", "w") as name:  # noqa: PTH123 - pathlib takes 5 ms
            name.write(COMM)
    except OSError:  # /proc may be mounted for reading only
        pass


def main(argv: Sequence[str]) -> int:
    """Forward until told to stop; the exit code."""
    # A service manager signals all processes of the daemon; packets are forwarded until the daemon ends.
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
        _signal.signal(number, _signal.SIG_IGN)
    _name_process()
    plane, tun, udp, channel, off = argv[1], int(argv[2]), int(argv[3]), int(argv[4]), argv[5].split(",")
    sys.path.append(os.path.abspath(__file__).removesuffix("/flanneld_py/udp/worker.py"))  # noqa: PTH100 - 5 ms
    control = _socket.socket(fileno=channel)
    try:
        try:
            pump, runs, why, names = choose(plane, tun, udp, channel, off)
        except (ImportError, OSError) as error:
            send(control, FAILED, 0, str(error).encode())
            return 1
        send(control, HELLO, 0, "\n".join([runs, why, " ".join(pump.offloads), names]).encode())
        while (failure := pump.wait(channel)) is None:
            try:
                obey(pump, control)
            except ControlClosed:
                pump.park()
                return 0
        send(control, FAILED, 0, failure.encode())
    except BrokenPipeError:
        pass
    return 1


if __name__ == "__main__":
    # At once: threads of the pump may be anywhere, and there is nothing to tidy up.
    os._exit(main(sys.argv))
