"""What happened in etcd, event by event: every revision of the keys below a prefix, from etcdctl."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import wait_for
from flanneld_py.lab.etcd import find_binary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.lab import EtcdServer


@dataclass(frozen=True, slots=True)
class Stored:
    """A subnet's key as it stands or stood; `version` counts its writes, `text` is None when deleted."""

    path: str
    text: str | None
    revision: int
    created: int
    version: int
    lease: int

    @property
    def key(self) -> str:
        return self.path.removeprefix("subnets/")

    @property
    def record(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.text or "{}")
        return parsed


def _stored(kv: dict[str, Any], *, deleted: bool = False) -> Stored:
    return Stored(
        path="/".join(base64.b64decode(kv["key"]).decode().rsplit("/", 2)[1:]),
        text=None if deleted else base64.b64decode(kv.get("value", "")).decode(),
        revision=kv["mod_revision"],
        created=kv.get("create_revision", 0),
        version=kv.get("version", 0),
        lease=kv.get("lease", 0),
    )


def revision(etcd: EtcdServer) -> int:
    """Of the whole store; every write by anybody makes it grow."""
    header: dict[str, int] = etcd.ctl_json("get", etcd.prefix)["header"]
    return header["revision"]


def nothing_written(etcd: EtcdServer, since: int) -> bool:
    """Whether no subnet's key was written or deleted after this revision."""
    return not history(etcd, since + 1)


def stored(etcd: EtcdServer, key: str) -> Stored | None:
    """A subnet's key as it stands."""
    kvs = etcd.ctl_json("get", f"{etcd.prefix}/subnets/{key}").get("kvs")
    return _stored(kvs[0]) if kvs else None


def record_at(etcd: EtcdServer, key: str) -> Stored:
    """The same of a key that must be there."""
    found = stored(etcd, key)
    assert found is not None, f"{key} is not in etcd"
    return found


def history(etcd: EtcdServer, since: int) -> list[Stored]:
    """Every write and delete of a subnet's key from a revision until now, in order."""
    end = f"{etcd.prefix}/end-of-history"
    etcd.ctl("put", end, "")
    watch = ["watch", f"--rev={since}", "--prefix", f"{etcd.prefix}/", "--write-out=json"]
    process = etcd.namespace.spawn("watch", [find_binary("etcdctl"), *watch], env={"ETCDCTL_API": "3"})
    mark = base64.b64encode(end.encode()).decode()
    text = wait_for(
        process.stdout.read_text, 10, "the history", lambda seen: mark in seen and seen[-1] == "\n"
    )
    etcd.namespace.discard(process)
    return [event for event in _events(text) if event.path.startswith("subnets/")]


def _events(text: str) -> Iterator[Stored]:
    for line in text.splitlines():
        for event in json.loads(line)["Events"]:
            yield _stored(event["kv"], deleted=event.get("type") == 1)
