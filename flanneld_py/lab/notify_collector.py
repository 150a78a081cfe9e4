"""Print each datagram of the socket on standard input as a JSON line: time, pid of the sender, text.

Run as a script by notify.py.
"""

from __future__ import annotations

import json
import socket
import struct
import time

UCRED = struct.Struct("=iII")
"""pid, uid, gid of the sender (unix(7), SCM_CREDENTIALS)."""


def collect() -> None:
    receiver = socket.socket(fileno=0)
    while True:
        data, ancillary, _, _ = receiver.recvmsg(1 << 16, socket.CMSG_SPACE(UCRED.size))
        pid = UCRED.unpack(ancillary[0][2])[0]
        print(json.dumps([time.monotonic(), pid, data.decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    collect()
