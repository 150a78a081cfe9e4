"""Print each datagram of the socket on standard input as a JSON line: time, pid of the sender, text.

With `keep` as argument it also keeps descriptors, as a service manager does (sd_notify(3), FDSTORE), and
gives them to kept_launcher.py. Run as a script by notify.py.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import sys
import time

UCRED = struct.Struct("=iII")
"""pid, uid, gid of the sender (unix(7), SCM_CREDENTIALS)."""
MOST_FDS = 8


def collect(*, keeps: bool) -> None:
    receiver = socket.socket(fileno=0)
    kept: list[tuple[str, int]] = []
    space = socket.CMSG_SPACE(UCRED.size) + socket.CMSG_SPACE(4 * MOST_FDS)
    while True:
        data, ancillary, _, _ = receiver.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
        pid, fds = 0, array.array("i")
        for _, kind, payload in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                pid = UCRED.unpack(payload)[0]
            else:
                fds.frombytes(payload[: len(payload) // 4 * 4])
        text = data.decode(errors="replace")
        if keeps and text == "GIVE=1":
            give(socket.socket(fileno=fds.pop()), kept)
        elif keeps and "FDSTORE" in text:
            kept = after(kept, text, list(fds))
        else:
            for fd in fds:
                os.close(fd)
        print(json.dumps([time.monotonic(), pid, text]), flush=True)


def after(kept: list[tuple[str, int]], text: str, fds: list[int]) -> list[tuple[str, int]]:
    """What is kept after one message."""
    fields = dict(line.split("=", 1) for line in text.splitlines())
    name = fields["FDNAME"]
    if "FDSTOREREMOVE" not in fields:
        return [*kept, *((name, fd) for fd in fds)]
    for held, fd in kept:
        if held == name:
            os.close(fd)
    return [(held, fd) for held, fd in kept if held != name]


def give(asking: socket.socket, kept: list[tuple[str, int]]) -> None:
    with asking:
        socket.send_fds(asking, [":".join(name for name, _ in kept).encode() or b":"], [fd for _, fd in kept])


if __name__ == "__main__":
    collect(keeps=sys.argv[1:] == ["keep"])
