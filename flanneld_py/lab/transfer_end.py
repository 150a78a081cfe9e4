"""One end of a TCP transfer; run as a script in a pod's namespace.

`receive ADDRESS` prints the port it listens on, then bytes and SHA-256 of what one client sent.
`send ADDRESS PORT BYTES SECONDS` sends pseudo-random bytes and prints the same of what it sent.
"""

from __future__ import annotations

import hashlib
import random
import socket
import sys
import time

CHUNK = 1 << 16


def receive(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    digest, size = hashlib.sha256(), 0
    with connection:
        while data := connection.recv(CHUNK):
            digest.update(data)
            size += len(data)
    print(size, digest.hexdigest())


def send(address: str, port: int, size: int, seconds: float) -> None:
    source = random.Random(size)  # noqa: S311 - the bytes need to differ, not to be secret
    digest = hashlib.sha256()
    start = time.monotonic()
    with socket.create_connection((address, port), timeout=10) as connection:
        connection.settimeout(None)
        for offset in range(0, size, CHUNK):
            time.sleep(max(0, start + seconds * offset / size - time.monotonic()))
            data = source.randbytes(min(CHUNK, size - offset))
            connection.sendall(data)
            digest.update(data)
    print(size, digest.hexdigest())


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
