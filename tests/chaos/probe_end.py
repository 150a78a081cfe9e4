"""Runs in a pod: sends tagged datagrams to all other pods, and notes what it sent and what it got.

    probe_end.py OWN PORT INTERVAL PEERS SENT RECEIVED

PEERS is a file that may change, with a line `NAME ADDRESS` for each address of each pod. Every datagram says
who sent it, whom it is for, its number, and when it was sent. SENT gets a line `NAME FAMILY NUMBER TIME` for
each, RECEIVED a line `SOURCE FAMILY NUMBER TIME`, or `! …` when it is not for this pod or not from there.
Times are those of CLOCK_MONOTONIC, the same for all pods of a machine.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

SO_RCVBUFFORCE = 33
BUFFER = 8 << 20
FLUSH_EVERY = 0.5


def open_sockets(port: int) -> dict[int, socket.socket]:
    """IP version → a socket that is bound to all addresses."""
    opened = {}
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        connection = socket.socket(family, socket.SOCK_DGRAM)
        if version == 6:
            connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        connection.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        connection.setblocking(False)
        connection.bind(("", port))
        opened[version] = connection
    return opened


class Peers:
    """Name and address of the other pods, read anew when the file was replaced."""

    def __init__(self, path: Path, own: str) -> None:
        self._path, self._own = path, own
        self._seen = -1
        self.others: list[tuple[str, str]] = []
        self.names: dict[str, str] = {}
        """Address → name."""

    def look(self) -> None:
        with suppress(OSError):
            inode = self._path.stat().st_ino
            if inode != self._seen:
                pairs = [line.split() for line in self._path.read_text().splitlines()]
                self.names |= {address: name for name, address in pairs}
                self.others = [(name, address) for name, address in pairs if name != self._own]
                self._seen = inode


def send(
    sockets: dict[int, socket.socket], own: str, port: int, peers: Peers, number: int, log: TextIO
) -> None:
    for name, address in peers.others:
        version = 6 if ":" in address else 4
        now = time.monotonic()
        text = f"{own} {name} {number} {now:.4f}"
        # No route, no buffer, an error that came back: such a packet is lost like any other.
        with suppress(OSError):
            sockets[version].sendto(text.encode(), (address, port))
        log.write(f"{name} {version} {number} {now:.4f}\n")


def receive(connection: socket.socket, version: int, own: str, peers: Peers, log: TextIO) -> None:
    while True:
        try:
            content, (address, *_) = connection.recvfrom(2048)
        except BlockingIOError:
            return
        except OSError:  # what came back for an earlier one
            continue
        source, target, number, _ = content.decode().split()
        known = peers.names.get(address)
        if target != own or known not in {source, None}:
            log.write(f"! {own} got {content.decode()} from {address} ({known}) at {time.monotonic():.4f}\n")
        log.write(f"{source} {version} {number} {time.monotonic():.4f}\n")


def main(own: str, port: str, interval: str, peers_file: str, sent_file: str, received_file: str) -> None:
    sockets, every = open_sockets(int(port)), float(interval)
    versions = {connection: version for version, connection in sockets.items()}
    peers = Peers(Path(peers_file), own)
    with Path(sent_file).open("a") as sent, Path(received_file).open("a") as received:
        # Another end may have sent from this pod before.
        number, due, flushed = int(time.monotonic() / every), time.monotonic(), 0.0
        while os.getppid() != 1:
            now = time.monotonic()
            if now >= due:
                peers.look()
                number += 1
                send(sockets, own, int(port), peers, number, sent)
                # A machine that was busy elsewhere does not send all at once what it has missed.
                due = max(due + every, now)
            if now - flushed > FLUSH_EVERY:
                sent.flush()
                received.flush()
                flushed = now
            for ready in select.select(list(versions), [], [], max(0.0, due - time.monotonic()))[0]:
                receive(ready, versions[ready], own, peers, received)


if __name__ == "__main__":
    # What was noted so far is written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main(*sys.argv[1:])
