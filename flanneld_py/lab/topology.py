"""The whole: underlay, etcd, hosts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from flanneld_py.lab.etcd import DEFAULT_PREFIX, EtcdServer
from flanneld_py.lab.hosts import Host
from flanneld_py.lab.notify import NotifySocket
from flanneld_py.lab.process import command_line, marked
from flanneld_py.lab.underlay import BOTH, Underlay
from flanneld_py.lab.waiting import LabError
from flanneld_py.lab.workspace import Workspace


class Lab:
    """An underlay with a running etcd, to which hosts are added. A context manager."""

    def __init__(self, *, mtu: int = 1500, prefix: str = DEFAULT_PREFIX) -> None:
        self.workspace = Workspace()
        try:
            self.underlay = Underlay(self.workspace, mtu)
            self.notify = NotifySocket(self.workspace)
            self.etcd = EtcdServer(self.workspace, self.underlay, prefix)
            self.hosts: list[Host] = []
            self.etcd.start()
        except BaseException:
            self.workspace.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_host(
        self, name: str, number: int | None = None, *, segment: int = 0, families: Sequence[int] = BOTH
    ) -> Host:
        """A new host at 192.0.2.<number>; the next free number when not given.

        Args:
            name: of the host.
            number: of its addresses.
            segment: of the underlay, 0 or 1; on the second one it is 198.51.100.<number>.
            families: the IP versions it has.
        """
        taken = {host.number for host in self.hosts}
        if number is None:
            number = next(n for n in range(1, 255) if n not in taken)
        if number in taken or name in {host.name for host in self.hosts}:
            raise LabError(f"there is a host {name!r} or a host number {number} already")
        host = Host(
            self.workspace,
            name,
            number,
            underlay=self.underlay,
            etcd=self.etcd,
            notify=self.notify,
            segment=segment,
            families=families,
        )
        self.hosts.append(host)
        return host

    def add_hosts(self, *names: str, families: Sequence[int] = BOTH) -> list[Host]:
        """Several, for `a, b = lab.add_hosts("a", "b")`."""
        return [self.add_host(name, families=families) for name in names]

    def start_daemons(self, args: Sequence[str] = (), timeout: float = 20) -> None:
        """Start the daemon of every host at once, wait until all are ready, and start a pod on each."""
        daemons = [host.start_daemon(args) for host in self.hosts]
        for daemon in daemons:
            daemon.wait_ready(timeout)
        for host in self.hosts:
            host.attach_pods()

    def remove_host(self, host: Host) -> None:
        """Scrap a host: its daemon is killed, its network and its disk are gone."""
        host.close()
        shutil.rmtree(host.directory)
        self.hosts.remove(host)

    def clear(self, prefix: str = DEFAULT_PREFIX) -> None:
        """Remove hosts and probes and start over below `prefix`, with etcd running and nothing dropped."""
        while self.hosts:
            self.remove_host(self.hosts[-1])
        self.workspace.kill(keep=self._permanent())
        self.underlay.nft("flush ruleset")
        self.etcd.prefix = prefix
        if self.etcd.running:
            self.etcd.resume()
        else:
            self.etcd.start()

    def _permanent(self) -> set[int]:
        return {self.underlay.holder_pid, self.notify.pid, self.etcd.process.pid}

    def leftovers(self) -> list[str]:
        """What of our own is there that should not be, when the lab is clear: processes and ports."""
        processes = [
            f"process {pid}: {' '.join(command_line(pid))}"
            for pid in marked(self.workspace.directory)
            if pid not in self._permanent()
        ]
        ports = [
            f"interface {link['ifname']} in the underlay"
            for link in self.underlay.ip("link", "show", "type", "veth")
        ]
        return processes + ports

    def report(self, lines: int = 50) -> list[tuple[str, str]]:
        """Title and text of what helps to understand a failure: ends of logs and status of the daemons."""
        sections = []
        for host in self.hosts:
            for daemon in host.daemons:
                state = "running" if daemon.running else f"exited with {daemon.wait_exit(1)}"
                sections.append((f"{host.name}: {daemon.log.name} ({state})", daemon.log_tail(lines)))
            if host.status_file.exists():
                sections.append((f"{host.name}: status.json", _indented(host.status_file.read_text())))
        return sections

    def close(self) -> None:
        """End all processes, remove all files. Safe to call twice."""
        self.workspace.close()


def _indented(text: str) -> str:
    """JSON for people, lists on one line; as it is when it is no JSON."""
    try:
        pretty = json.dumps(json.loads(text), indent=1)
    except ValueError:
        return text
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), pretty)
