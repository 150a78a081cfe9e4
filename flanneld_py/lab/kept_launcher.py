"""Execute a command with the descriptors that notify_collector.py keeps, as a service manager does.

Run as a script: kept_launcher.py SOCKET COMMAND… See sd_listen_fds(3).
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys

FIRST = 3
OUT_OF_THE_WAY = 100
MOST_FDS = 8


def launch(path: str, command: list[str]) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(path)
        socket.send_fds(manager, [b"GIVE=1"], [its.fileno()])
        names, fds, _, _ = socket.recv_fds(ours, 1 << 16, MOST_FDS)
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY) for fd in fds]
        for fd in fds:
            os.close(fd)
    if moved:
        for place, fd in enumerate(moved, FIRST):
            os.dup2(fd, place)
        os.environ.update(
            LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(moved)), LISTEN_FDNAMES=names.decode()
        )
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    launch(sys.argv[1], sys.argv[2:])
