"""One end of a TCP connection that lasts for a whole run, with a numbered line now and then.

    flow_end.py serve ADDRESS PORT
    flow_end.py ask ADDRESS PORT

Both print a line for what matters: `connected TIME`, `progress NUMBER TIME` twice a second at most,
`broken TIME WHY`, after which they end. Each line must come back as it was sent, and in order.
"""

from __future__ import annotations

import socket
import sys
import time

EVERY = 0.1
TELL_EVERY = 0.5
PATIENCE = 600
CONNECT = 10.0


def tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def kept(connection: socket.socket) -> socket.socket:
    """Retries come soon and go on: what is lost for a while must not end the connection."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(PATIENCE)
    return connection


def serve(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as listener:
        tell("listening", time.monotonic())
        while True:
            connection, _ = listener.accept()
            with kept(connection), connection.makefile("rb") as lines:
                try:
                    for line in lines:
                        connection.sendall(line)
                except OSError as error:
                    tell("broken", time.monotonic(), error)


def connected(address: str, port: int) -> socket.socket:
    """A host that was just booted has no way to others yet, nor perhaps for long."""
    while True:
        try:
            return socket.create_connection((address, port), timeout=CONNECT)
        except OSError:
            time.sleep(EVERY)


def ask(address: str, port: int) -> None:
    with kept(connected(address, port)) as connection:
        tell("connected", time.monotonic())
        number, told = 0, 0.0
        with connection.makefile("rb") as answers:
            while True:
                number += 1
                question = f"{number} {'x' * (number % 997)}\n".encode()
                connection.sendall(question)
                answer = answers.readline()
                if answer != question:
                    tell("broken", time.monotonic(), f"line {number} came back as {answer[:40]!r}")
                    return
                if time.monotonic() - told >= TELL_EVERY:
                    told = time.monotonic()
                    tell("progress", number, told)
                time.sleep(EVERY)


def main(what: str, address: str, port: str) -> None:
    try:
        {"serve": serve, "ask": ask}[what](address, int(port))
    except OSError as error:
        tell("broken", time.monotonic(), error)


if __name__ == "__main__":
    main(*sys.argv[1:])
