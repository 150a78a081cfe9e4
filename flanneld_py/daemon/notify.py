"""sd_notify(3): telling systemd that we are ready and what we are doing."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


class Notifier:
    """Sends to $NOTIFY_SOCKET; silent where there is none."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the NUL byte of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def send(self, **fields: str) -> None:
        """`send(READY="1", STATUS="…")`. A manager that went away is no reason to fail, nor is a limit."""
        if not self._address:
            return
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto(message.encode(errors="backslashreplace"), self._address)
