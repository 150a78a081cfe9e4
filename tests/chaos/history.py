"""Everything that ever happened in etcd, followed by etcdctl from the first revision on."""

from __future__ import annotations

import base64
import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import WaitTimeout, wait_for
from flanneld_py.lab.etcd import find_binary

if TYPE_CHECKING:
    from flanneld_py.lab import EtcdServer
    from flanneld_py.lab.process import Process

LOOK_EVERY = 0.05
ANEW_EVERY = 1.0
"""Seconds from one try to the next to follow a member that was gone."""
END = "end-of-history"


@dataclass(frozen=True, slots=True)
class Event:
    """One write or delete of a key below the prefix."""

    at: float
    """When it was seen, on the clock of time.monotonic(): later than it was, by little while etcd works."""
    revision: int
    key: str
    """Relative to the prefix: `subnets/10.5.101.0-24`."""
    value: str | None
    """None: deleted, or expired."""
    lease: int

    @property
    def record(self) -> dict[str, Any]:
        """Of a subnet's key; empty when it is none that can be read."""
        try:
            parsed = json.loads(self.value or "{}")
        except ValueError:
            return {}
        return parsed if isinstance(parsed, dict) else {}

    @property
    def owner(self) -> str:
        """Node id; empty: deleted, or not of this daemon."""
        return str(self.record.get("NodeID", ""))


class _Follower:
    """etcdctl at one member, which it does not leave: begun anew when it ends or is told to."""

    def __init__(self, etcd: EtcdServer, url: str) -> None:
        self._etcd = etcd
        self._url = url
        self._process: Process | None = None
        self._read = 0

    def begin(self, revision: int) -> None:
        """Anew, from a revision on."""
        self.end()
        watch = ["watch", "", f"--rev={revision}", "--prefix", "--write-out=json"]
        argv = [find_binary("etcdctl"), f"--endpoints={self._url}", *watch]
        self._process = self._etcd.namespace.spawn("history", argv, env={"ETCDCTL_API": "3"})
        self._read = 0

    def end(self) -> None:
        if self._process is not None:
            self._etcd.namespace.discard(self._process)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.running

    def lines(self) -> list[str]:
        """What it has written since the last call."""
        if self._process is None:
            return []
        with self._process.stdout.open() as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        return whole.splitlines()


class History:
    """Followed at every member, so that it is known whatever becomes of two of them."""

    def __init__(self, etcd: EtcdServer) -> None:
        self._etcd = etcd
        self._events: dict[tuple[int, str], Event] = {}
        self._elsewhere: set[int] = set()
        """Revisions of what is not below the prefix."""
        self.revision = 0
        """Up to which all is known."""
        self._followers = [_Follower(etcd, url) for url in etcd.endpoint.split(",")]
        self._over = threading.Event()
        self._anew = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="history", daemon=True)
        self._thread.start()

    @property
    def events(self) -> list[Event]:
        return [self._events[place] for place in sorted(self._events)]

    def _follow(self) -> None:
        begun = 0.0
        while not self._over.wait(LOOK_EVERY):
            for follower in self._followers:
                for line in follower.lines():
                    self._take(line, time.monotonic())
            if time.monotonic() - begun > ANEW_EVERY or self._anew.is_set():
                begun = time.monotonic()
                for follower in self._followers:
                    if not follower.runs or self._anew.is_set():
                        follower.begin(self.revision + 1)
                self._anew.clear()
        for follower in self._followers:
            follower.end()

    def _take(self, line: str, now: float) -> None:
        for event in json.loads(line).get("Events") or ():
            kv = event["kv"]
            path, prefix = base64.b64decode(kv["key"]).decode(), f"{self._etcd.prefix}/"
            revision, deleted = kv["mod_revision"], event.get("type") == 1
            self.revision = max(self.revision, revision)
            if not path.startswith(prefix):
                self._elsewhere.add(revision)
                continue
            key = path.removeprefix(prefix)
            self._events.setdefault(
                (revision, key),
                Event(
                    at=now,
                    revision=revision,
                    key=key,
                    value=None if deleted else base64.b64decode(kv.get("value", "")).decode(),
                    lease=kv.get("lease", 0),
                ),
            )

    def finish(self) -> None:
        """Wait until all is known that has happened before this call, and follow no longer."""
        self._etcd.ctl("put", f"{self._etcd.prefix}/{END}", "")

        def ended() -> bool:
            return any(key == END for _, key in list(self._events))

        for patience in (3, 20):
            with suppress(WaitTimeout):
                wait_for(ended, patience, "the end of the history")
                break
            # A watch may hang after all that was done to its member.
            self._anew.set()
        self.close()

    def close(self) -> None:
        """Follow no longer."""
        self._over.set()
        self._thread.join(10)

    @property
    def gaps(self) -> list[int]:
        """Revisions that are not known."""
        known = {revision for revision, _ in self._events} | self._elsewhere
        return sorted(set(range(min(known, default=0), max(known, default=0))) - known)

    def subnets(self) -> list[Event]:
        """Those of subnets' keys, in order."""
        return [event for event in self.events if event.key.startswith("subnets/")]
