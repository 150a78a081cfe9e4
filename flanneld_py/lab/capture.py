"""Packets as they pass an interface, decoded by scapy.

scapy is GPL and takes 150 ms and 35 MB to import, so it is imported here only, and only when used.
"""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flanneld_py.lab.waiting import LabError, wait_for

if TYPE_CHECKING:
    from flanneld_py.lab.netns import Namespace

_FILE_HEADER = 24
"""Bytes before the first packet (pcap-savefile(5))."""


class Capture:
    """tcpdump on an interface from now on until `stop()`."""

    def __init__(self, namespace: Namespace, interface: str, expression: str) -> None:
        self._namespace = namespace
        self._what = f"{expression!r} on {interface} of {namespace.name}"
        # The file is written through standard output: tcpdump gives up root before it opens files.
        self._process = namespace.spawn(
            "tcpdump",
            ["tcpdump", "--immediate-mode", "-U", "-i", interface, "-w", "-", *expression.split()],
        )
        wait_for(self._said, 10, f"tcpdump of {self._what} to listen", lambda said: "listening on" in said)

    def _said(self) -> str:
        said = self._process.stderr.read_text()
        if not self._process.running:
            raise LabError(f"tcpdump of {self._what} ended: {said.strip()}")
        return said

    def wait_packet(self, timeout: float = 5) -> None:
        """Wait until something has been captured.

        Raises:
            WaitTimeout: nothing has.
        """
        size = self._process.stdout.stat
        wait_for(lambda: size().st_size, timeout, f"a packet {self._what}", lambda n: n > _FILE_HEADER)

    def stop(self) -> list[Any]:
        """End it; the packets as scapy objects, in order. LabError without scapy."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)
        packets = read_packets(self._process.stdout)
        self._namespace.discard(self._process)
        return packets


def read_packets(path: Path) -> list[Any]:
    """The packets of a pcap file as scapy objects; LabError without scapy."""
    try:
        for layer in ("inet", "inet6", "vxlan"):
            importlib.import_module(f"scapy.layers.{layer}")
        utils = importlib.import_module("scapy.utils")
    except ImportError:
        raise LabError("decoding packets needs scapy: pip install 'flanneld-py[debug]'") from None
    return list(utils.rdpcap(str(path))) if path.stat().st_size > _FILE_HEADER else []
