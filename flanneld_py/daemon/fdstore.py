"""Descriptors that outlive the process: the service manager keeps them over a restart.

sd_notify(3), FDSTORE; sd_listen_fds(3) gives them back. Only the standard library is imported, as they are
used before anything else.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

FIRST = 3
"""SD_LISTEN_FDS_START."""


def take_kept() -> dict[str, int]:
    """Those that an earlier process of the service left, by name; of one name the last. Only once."""
    told = {name: os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if told["LISTEN_PID"] != str(os.getpid()) or not told["LISTEN_FDS"].isdecimal():
        return {}
    fds = range(FIRST, FIRST + int(told["LISTEN_FDS"]))
    kept: dict[str, int] = {}
    for name, fd in zip(told["LISTEN_FDNAMES"].split(":"), fds, strict=False):
        with suppress(OSError):
            os.set_inheritable(fd, False)
            if name in kept:
                os.close(kept[name])
            kept[name] = fd
    return kept


class FdStore:
    """Sends to $NOTIFY_SOCKET; silent where there is none."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the NUL byte of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def keep(self, name: str, fd: int) -> None:
        """In the place of what was kept under that name before."""
        self.forget(name)
        # FDPOLL=0: an ICMP error that waits on a socket is no reason to throw it away.
        self._send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)

    def forget(self, name: str) -> None:
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, message: str, *fds: int) -> None:
        if not self._address:
            return
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.connect(self._address)
            socket.send_fds(sock, [message.encode()], list(fds))
