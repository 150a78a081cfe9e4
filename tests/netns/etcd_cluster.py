"""Three members of etcd, each in a machine of its own in the underlay."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import CommandFailed, EtcdServer, wait_for
from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.underlay import ipv4

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.lab import Lab
    from flanneld_py.lab.process import Process

NUMBERS = (241, 242, 243)
"""Of the members' machines: 192.0.2.241 and so on."""


class Member(Namespace):
    """One machine with etcd on it."""

    def __init__(self, lab: Lab, number: int) -> None:
        super().__init__(lab.workspace, f"etcd{number}")
        self._lab = lab
        self.address = ipv4(number)
        self.scheme = "http"
        lab.underlay.attach(self, number)
        self.process: Process | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}:2379"

    def start(self, binary: str, flags: Sequence[str] = ()) -> None:
        data = self._lab.workspace.fast_directory / self.name
        members = ",".join(f"etcd{number}=http://{ipv4(number)}:2380" for number in NUMBERS)
        command = [
            binary,
            f"--name={self.name}",
            f"--data-dir={data}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls=http://{self.address}:2380",
            f"--initial-advertise-peer-urls=http://{self.address}:2380",
            f"--initial-cluster={members}",
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--logger=zap",
            "--log-level=warn",
            *flags,
        ]
        self.process = self.spawn("etcd", command)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None

    def cut(self) -> None:
        """Nothing gets in or out any more; connections stay open."""
        self._lab.underlay.cut(self)

    def mend(self) -> None:
        self._lab.underlay.mend(self)


class Cluster(EtcdServer):
    """In the place of the lab's single etcd, and used like that; hosts are given all endpoints, in order."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab.workspace, lab.underlay, lab.etcd.prefix)
        self.members = [Member(lab, number) for number in NUMBERS]

    @property
    def endpoint(self) -> str:
        return ",".join(member.url for member in self.members)

    @property
    def _local_endpoint(self) -> str:
        # Killed ones would cost etcdctl time.
        return ",".join(member.url for member in self.members if member.process is not None)

    def start(self, *, empty: bool = False) -> None:  # noqa: ARG002 - no test starts a cluster without its data
        """All members that are not running; they have to be a majority with those that are."""
        for member in self.members:
            if member.process is None:
                member.scheme = self.scheme
                member.start(self._binary, self.server_flags)
        wait_for(self._health, 20, "the cluster to answer", lambda healthy: healthy == len(NUMBERS), 0.05)

    def _health(self) -> int:
        with suppress(CommandFailed):
            told: list[dict[str, Any]] = json.loads(self.ctl("endpoint", "health", "--write-out=json"))
            return sum(member["health"] for member in told)
        return 0

    def leader(self) -> Member:
        """The member that leads at the moment."""

        def find() -> Member | None:
            with suppress(CommandFailed):
                for told in json.loads(self.ctl("endpoint", "status", "--write-out=json")):
                    if told["Status"]["leader"] == told["Status"]["header"]["member_id"]:
                        return next(member for member in self.members if member.url == told["Endpoint"])
            return None

        found = wait_for(find, 10, "a leader")
        assert found is not None
        return found
