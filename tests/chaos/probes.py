"""Constant traffic between the pods: tagged datagrams from each to each, and TCP connections in a ring."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.foreign import PORT

if TYPE_CHECKING:
    from flanneld_py.lab import Host
    from flanneld_py.lab.process import Process

_HERE = Path(__file__).parent
_PYTHON = [sys.executable, "-I", "-S"]
INTERVAL = 0.05
FLOW_PORT = 7008
Way = tuple[str, str, int]
"""Source, destination, IP version."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What all pods noted."""

    sent: dict[Way, dict[int, float]] = field(default_factory=dict)
    """Way → number → when."""
    received: dict[Way, dict[int, float]] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Datagrams at the wrong pod, or not from whom they say."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What one TCP connection met."""

    source: str
    target: str
    progress: float
    """When the last line came back."""
    broken: str
    """Why it ended; empty while it lives."""


class Probes:
    """Starts the ends, and reads what they noted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._peers: dict[str, list[str]] = {}
        self._names: list[str] = []
        self._senders: dict[str, Process] = {}
        self._flows: dict[tuple[str, str], tuple[Process, Process]] = {}
        """Source and target → both ends of a connection."""

    def add(self, host: Host) -> None:
        """Let a host's pod send and be sent to."""
        self._peers[host.name] = [str(address) for address in host.pod.addresses]
        if host.name not in self._names:
            self._names.append(host.name)
        self._write_peers()
        files = [self._directory / f"{host.name}.{kind}" for kind in ("sent", "received")]
        argv = [*_PYTHON, str(_HERE / "probe_end.py"), host.name, str(PORT), str(INTERVAL)]
        argv += [str(self._peers_file), *map(str, files)]
        self._senders[host.name] = host.pod.spawn("probe", argv)

    def remove(self, host: Host) -> None:
        """Its pod is about to go: nobody sends to it any more, and connections with it are forgotten."""
        if self._peers.pop(host.name, None) is None:
            return  # it was booted before it had joined in again
        self._write_peers()
        for ends in [ends for ends in self._flows if host.name in ends]:
            for process in self._flows.pop(ends):
                host.workspace.discard(process)
        sender = self._senders.pop(host.name)
        sender.terminate()
        host.workspace.discard(sender)

    def connect(self, source: Host, target: Host) -> None:
        """A TCP connection for the rest of the run, if there is none yet."""
        if (source.name, target.name) in self._flows:
            return
        address = str(target.pod.addresses[-1])
        argv = [*_PYTHON, str(_HERE / "flow_end.py")]
        listener = target.pod.spawn("flow", [*argv, "serve", address, str(FLOW_PORT)])
        # The shell waits for the listener, which starts at the same moment.
        client = source.pod.spawn(
            "flow", ["sh", "-c", 'sleep 1; exec "$@"', "sh", *argv, "ask", address, str(FLOW_PORT)]
        )
        self._flows[source.name, target.name] = client, listener

    @property
    def _peers_file(self) -> Path:
        return self._directory / "peers"

    def _write_peers(self) -> None:
        lines = [f"{name} {address}\n" for name, addresses in self._peers.items() for address in addresses]
        fresh = self._peers_file.with_suffix(".new")
        fresh.write_text("".join(lines))
        fresh.replace(self._peers_file)

    def flows(self) -> list[Flow]:
        return [_flow(*ways, client.stdout.read_text()) for ways, (client, _) in self._flows.items()]

    def read(self) -> Traffic:
        """All that was noted until now."""
        traffic = Traffic()
        for name in self._names:
            for target, version, number, at in _lines(self._directory / f"{name}.sent"):
                traffic.sent.setdefault((name, target, int(version)), {})[int(number)] = float(at)
            for line in _lines(self._directory / f"{name}.received"):
                if line[0] == "!":
                    traffic.wrong.append(" ".join(line[1:]))
                    continue
                source, version, number, at = line
                seen = traffic.received.setdefault((source, name, int(version)), {})
                if int(number) in seen:
                    traffic.doubled.append(f"{source} to {name}: number {number} (IPv{version}) at {at}")
                seen[int(number)] = float(at)
        return traffic


def _lines(file: Path) -> list[list[str]]:
    """Whole ones only: the last one may be in the middle of being written."""
    text = file.read_text() if file.exists() else ""
    return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]


def _flow(source: str, target: str, text: str) -> Flow:
    progress, broken = 0.0, ""
    for line in text.splitlines():
        words = line.split(maxsplit=2)
        if words[0] == "progress":
            progress = float(words[2])
        if words[0] == "broken":
            broken = line
    return Flow(source, target, progress, broken)
