"""An anonymous network namespace and what an operator would type inside it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flanneld_py.lab.probes import PingResult, PingRun, ping
from flanneld_py.lab.process import Process
from flanneld_py.lab.waiting import LabError, wait_for
from flanneld_py.lab.workspace import Workspace


class Namespace:
    """A network namespace that lives as long as a holder process of ours.

    Nothing stands in /run/netns. The holder reads a pipe whose other end only the lab has, so it ends even
    if the lab is killed before the holder has asked for the parent-death signal.
    """

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace = workspace
        self.name = name
        self._hold()

    def _hold(self) -> None:
        command = ["unshare", "--net", "--", "cat"]
        self._holder = self.workspace.spawn(f"{self.name}-netns", command, stdin=subprocess.PIPE)
        own = Path("/proc/self/ns/net").readlink()
        wait_for(
            self._identity, 10, f"the namespace of {self.name}", lambda seen: seen not in {None, own}, 0.001
        )

    def _identity(self) -> Path | None:
        if not self._holder.running:
            raise LabError(f"no network namespace for {self.name}: {self._holder.output().strip()}")
        try:
            return Path(self.path).readlink()
        except OSError:
            return None

    @property
    def holder_pid(self) -> int:
        """For `ip link set … netns <pid>` and `nsenter --target <pid> --net`."""
        return self._holder.pid

    @property
    def path(self) -> str:
        return f"/proc/{self._holder.pid}/ns/net"

    def entered(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` in here."""
        return ["nsenter", f"--net={self.path}", "--", *argv]

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> Process:
        """Start a command in here, in the background."""
        return self.workspace.spawn(f"{self.name}-{name}", self.entered(argv), env=env, output=output)

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        text: str = "",
        timeout: float = 20,
    ) -> str:
        """Run a command in here to its end; returns standard output, raises CommandFailed."""
        return self.workspace.run(self.entered(argv), env=env, text=text, timeout=timeout)

    def ip(self, *args: str) -> list[dict[str, Any]]:
        """`ip -json -details …`; what it prints, or an empty list for commands that print nothing."""
        return _parsed(self.run(["ip", "-json", "-details", *args]))

    def bridge(self, *args: str) -> list[dict[str, Any]]:
        """`bridge -json …`, as `ip`."""
        return _parsed(self.run(["bridge", "-json", *args]))

    def ip_batch(self, commands: Sequence[str]) -> None:
        """Several `ip` commands in one process; the first that fails ends it (CommandFailed)."""
        self.run(["ip", "-batch", "-"], text="".join(f"{command}\n" for command in commands))

    def nft(self, rules: str) -> None:
        """`nft -f -`: one atomic transaction."""
        self.run(["nft", "-f", "-"], text=rules)

    def sysctl(self, settings: Mapping[str, int | str]) -> None:
        """Set kernel parameters of this namespace; those this kernel lacks are passed over."""
        self.run(["sysctl", "-e", "-q", "-w", *(f"{name}={value}" for name, value in settings.items())])

    def ping(
        self,
        address: str,
        count: int = 3,
        interval: float = 0.01,
        *,
        size: int | None = None,
        df: bool = False,
        wait: float = 1,
    ) -> PingResult:
        """Send `count` echo requests and count the answers.

        Args:
            address: IPv4 or IPv6.
            count: requests to send.
            interval: seconds between them.
            size: of the whole IP packet in bytes (not of the payload); ping's default when not given.
            df: forbid fragmentation on the way.
            wait: seconds to wait for answers after the last request.
        """
        return ping(self, address, count, interval, size=size, df=df, wait=wait)

    def start_ping(self, address: str, interval: float = 0.005) -> PingRun:
        """Ping in the background until `.stop()`, which tells exactly what was lost."""
        return PingRun(self, address, interval)

    def discard(self, process: Process) -> None:
        """End a process started here with SIGKILL."""
        self.workspace.discard(process)

    def close(self) -> None:
        """Let go of the namespace; the kernel removes it when its last process has ended."""
        self.workspace.discard(self._holder)


def _parsed(text: str) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(text) if text.strip() else []
    return parsed
