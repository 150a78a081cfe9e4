"""flanneld-py: from the command line to the daemon, and how a start fails.

Only the standard library is imported before `main` minds signals: the rest takes a tenth of a second.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from flanneld_py.cli.putoff import put_off
from flanneld_py.daemon import garbage
from flanneld_py.daemon.fdstore import take_kept
from flanneld_py.errors import FlanneldError, HostError
from flanneld_py.udp.kept import Kept

if TYPE_CHECKING:
    from flanneld_py.daemon.run import Daemon

EX_USAGE = 2
EX_CONFIG = 78
"""sysexits.h: a restart does not cure it."""
STDERR = 2
SAY_MILLISECONDS = 1000
"""A last word waits no longer for its reader."""
START_SECONDS = 30
"""A start that takes longer hangs, as Python does when a new thread lacks memory for its first steps."""
OPEN_FILES = 128
"""Several times what is open with two etcd endpoints; a client of the socket takes one more."""
ADDRESS_SPACE = 2 << 30
"""Bytes: somewhat more than the threads of gRPC reserve; hardly any of it is memory in use."""
SWITCH = 0.001
"""Seconds for which a thread may keep the others from running; with 5 ms, the default, each of them adds that
to the time from a host's record to the route to it."""
LIMITS = {
    errno.EMFILE: "raise the limit on open files (ulimit -n, LimitNOFILE= of the service)",
    errno.ENFILE: "raise the host's limit on open files (sysctl fs.file-max)",
    errno.ENOMEM: "raise the limit on memory (ulimit -v, LimitAS= of the service)",
    errno.EAGAIN: "raise the limits on tasks and memory (ulimit -u, -v; TasksMax=, LimitAS= of the service)",
}
"""What a start may run into, and what to do about it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends the process."""
    _mind_signals()
    garbage.begin()
    put_off()
    sys.setswitchinterval(SWITCH)
    daemon, code = _start(argv, _resume())
    signal.setitimer(signal.ITIMER_REAL, 0)
    if daemon is not None:
        code = daemon.run()
        if daemon.ended_by is not None:
            _say(str(daemon.ended_by))
    # gRPC's own clean-up can wait for a server that hangs; nothing of ours is left to do.
    os._exit(code)


def _resume() -> Kept:
    """Forward packets again, if that is our business, before all the rest is imported."""
    kept = take_kept()
    if not kept:
        return Kept({}, None)
    from flanneld_py.udp.resume import resume  # noqa: PLC0415

    return Kept(kept, resume(kept))


def _mind_signals() -> None:
    """Until the daemon takes its signals itself nothing is begun, so there is nothing to bring to an end."""

    def end(_number: int, _frame: FrameType | None) -> None:
        os._exit(os.EX_OK)

    def ignore(_number: int, _frame: FrameType | None) -> None:
        pass  # SIG_IGN would hide the signal from sigwait, too

    def hurry(_number: int, _frame: FrameType | None) -> None:
        raise RuntimeError(
            f"not done within {START_SECONDS} s; {LIMITS[errno.ENOMEM]}, or see what else hangs"
        )

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, ignore)
    signal.signal(signal.SIGALRM, hurry)
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)


def _start(argv: Sequence[str] | None, kept: Kept) -> tuple[Daemon | None, int]:
    """A daemon at work, or the exit code."""
    try:
        _open_standard_streams()
        # A watchdog ends a process that hangs by SIGABRT: the journal then has where each thread stood.
        faulthandler.enable(STDERR)
        _require_limits()
        return _from_command_line(argv, kept)
    except FlanneldError as error:
        number = _limit(error.__cause__ or error.__context__)
        _say(f"{error}; {LIMITS[number]}" if number else str(error))
        return None, EX_CONFIG if number else error.exit_code
    except (OSError, RuntimeError, MemoryError, ImportError) as error:
        reason, code = explain(error)
        _say(f"cannot start: {reason}")
        return None, code


def _from_command_line(argv: Sequence[str] | None, kept: Kept) -> tuple[Daemon | None, int]:
    import click  # noqa: PLC0415

    from flanneld_py.cli import daemonflags  # noqa: PLC0415

    try:
        return daemonflags.start(sys.argv[1:] if argv is None else argv, kept), os.EX_OK
    except click.ClickException as error:
        _say(error.format_message())
        return None, EX_USAGE


def _open_standard_streams() -> None:
    """Where one is closed, a file or socket of ours would take its number and get what is meant for it."""
    for fd in range(STDERR + 1):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one


def _require_limits() -> None:
    """Take what the hard limits allow: gRPC hangs or aborts the process when it meets them.

    Raises:
        HostError: that is too little.
    """
    import resource  # noqa: PLC0415

    for kind, needed, name, number in (
        (resource.RLIMIT_NOFILE, OPEN_FILES, "open files", errno.EMFILE),
        (resource.RLIMIT_AS, ADDRESS_SPACE, "bytes of address space", errno.ENOMEM),
    ):
        soft, hard = resource.getrlimit(kind)
        if soft == resource.RLIM_INFINITY or soft >= needed:
            continue
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise HostError(
                f"cannot start: only {hard} {name} are allowed, and flanneld-py needs {needed} "
                f"({errno.errorcode[number]}); {LIMITS[number]}"
            )
        resource.setrlimit(kind, (needed, hard))


def explain(error: Exception) -> tuple[str, int]:
    """What a failed start says, in one line, and the exit code: a limit is no defect of ours."""
    number = _limit(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if number is None:
        return f"{type(error).__name__}: {text}", os.EX_SOFTWARE
    return f"{text} ({errno.errorcode[number]}); {LIMITS[number]}", EX_CONFIG


def _limit(error: BaseException | None) -> int | None:
    """The errno of the limit that was reached, if it was one."""
    if error is None:
        return None
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno if error.errno in LIMITS else None
    # The loader and threading tell it in words only.
    if "can't start new thread" in str(error):
        return errno.EAGAIN
    words = {os.strerror(number): number for number in LIMITS} | {"failed to map segment": errno.ENOMEM}
    return next((number for said, number in words.items() if said in str(error)), None)


def _say(text: str) -> None:
    """One line on stderr, if it takes one."""
    with suppress(OSError):
        poll = select.poll()
        poll.register(STDERR, select.POLLOUT)
        if poll.poll(SAY_MILLISECONDS):
            os.write(STDERR, f"flanneld-py: {text}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    main()
