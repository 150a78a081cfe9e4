"""Three members of etcd, and what faults do to them."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from flanneld_py.lab import CommandFailed
from tests.chaos.fault import Impossible
from tests.chaos.history import History
from tests.netns.etcd_cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from flanneld_py.lab import Host, Lab
    from tests.chaos.history import Event
    from tests.netns.etcd_cluster import Member

CTL_TIMEOUT = 6.0
QUOTA, FILLING, FILLER = 8 << 20, 1_000_000, "/filler/"
"""Bytes of each member's database, and of each of the keys that fill them."""


class ChaosCluster(Cluster):
    """Asked through members that are known to be well, where there are some."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.unusable: set[Member] = set()
        """Those that do not answer though they run."""

    @property
    def _local_endpoint(self) -> str:
        well = [member for member in self.members if member.process and member not in self.unusable]
        return ",".join(member.url for member in well or self.members)

    def start_one(self, member: Member) -> None:
        """Without waiting for it."""
        member.start(self._binary, self.server_flags)


class EtcdHands:
    """What faults do to etcd; all that takes long or fails for want of a quorum is Impossible."""

    def __init__(self, lab: Lab) -> None:
        lab.etcd.stop()
        self.cluster = lab.etcd = ChaosCluster(lab)
        self.cluster.server_flags = (*self.cluster.server_flags, f"--quota-backend-bytes={QUOTA}")
        self.cluster.start()
        self.history = History(self.cluster)

    @property
    def prefix(self) -> str:
        return self.cluster.prefix

    @property
    def members(self) -> list[Member]:
        return self.cluster.members

    @property
    def unusable(self) -> set[Member]:
        return self.cluster.unusable

    def member(self, name: str) -> Member:
        return self.members[int(name)]

    def signal(self, name: str, number: signal.Signals) -> None:
        """SIGSTOP or SIGCONT."""
        member = self.member(name)
        if member.process is None:
            raise Impossible(f"member {name} does not run")
        member.process.send_signal(number)
        if number == signal.SIGSTOP:
            self.unusable.add(member)
        else:
            self.unusable.discard(member)

    def start(self, names: Iterable[str]) -> None:
        """Those that do not run."""
        for name in names:
            if self.member(name).process is None:
                self.cluster.start_one(self.member(name))

    def leader(self) -> str:
        """The member that leads."""
        for told in json.loads(self.ctl("endpoint", "status", "--write-out=json")):
            if told["Status"].get("leader") == told["Status"]["header"]["member_id"]:
                urls = [member.url for member in self.members]
                return str(urls.index(told["Endpoint"]))
        raise Impossible("nobody leads")

    def move_leader(self, pick: int) -> None:
        """To another member."""
        told = json.loads(self.ctl("endpoint", "status", "--write-out=json"))
        leader = self.leader()
        others = [t for t in told if t["Endpoint"] != self.member(leader).url]
        if not others:
            raise Impossible("there is no other member")
        to = others[pick % len(others)]["Status"]["header"]["member_id"]
        self.ctl("move-leader", f"{to:x}")

    def fill(self) -> None:
        """Until it refuses all that is new (alarm NOSPACE)."""
        for number in range(2 * QUOTA // FILLING):
            with suppress(Impossible):
                self.ctl("put", f"{FILLER}{number}", text="x" * FILLING)
                continue
            break
        if "NOSPACE" not in self.ctl("alarm", "list"):
            self.ctl("del", "--prefix", FILLER)
            raise Impossible("it did not fill up")

    def make_room(self) -> None:
        """As etcd's manual has it."""
        self.ctl("del", "--prefix", FILLER)
        revision = json.loads(self.ctl("get", FILLER, "--write-out=json"))["header"]["revision"]
        if self.history.revision < revision:
            raise Impossible("what has happened is not read yet, and could not be after a compaction")
        self.ctl("compact", str(revision))
        for member in self.members:
            self.ctl("defrag", f"--endpoints={member.url}")
        self.ctl("alarm", "disarm")

    def ctl(self, *args: str, text: str = "") -> str:
        """`etcdctl …`, by which faults are caused and healed."""
        try:
            options = ("--dial-timeout=1s", "--command-timeout=2s")
            return self.cluster.ctl(*options, *args, text=text, timeout=CTL_TIMEOUT)
        except CommandFailed as error:
            raise Impossible(str(error)) from None

    def _last(self, host: Host) -> Event:
        """The last write of a host's record, by the history."""
        found = [event for event in self.history.subnets() if event.owner == host.node_id]
        if not found:
            raise Impossible(f"{host.name} has never had a record")
        return found[-1]

    def has_had_record(self, host: Host) -> bool:
        return any(event.owner == host.node_id for event in self.history.subnets())

    def own_path(self, host: Host) -> str:
        """The key of a host's record."""
        return f"{self.prefix}/{self._last(host).key}"

    def own_record(self, host: Host) -> dict[str, Any]:
        return self._last(host).record

    def own_lease(self, host: Host) -> str:
        """The etcd lease of a host's record, as etcdctl writes it."""
        return f"{self._last(host).lease:x}"

    def leases(self) -> list[str]:
        """All that etcd has granted and not ended."""
        listed = self.cluster.ctl("lease", "list", "--write-out=json")
        return [f"{lease['id']:x}" for lease in json.loads(listed).get("leases") or ()]

    def make_whole(self) -> None:
        """All members run and agree."""
        for member in self.members:
            member.mend()
            if member.process is not None:
                member.process.send_signal(signal.SIGCONT)
        self.unusable.clear()
        self.cluster.start()
