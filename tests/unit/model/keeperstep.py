"""The daemon's own lease keeper, one step at a time, as a function of values.

The keeper, its writer and the driver below them are the real ones. What they keep from one step to the next
is taken out of them after a step, as a `Brain`, and put back before the next one. A step that needs an answer
of etcd, or a throw of the dice, ends there; it is taken again from its beginning with the answers that there
are. So it can be left alone in the middle for as long as a host may hang.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias
from unittest.mock import patch

from msgspec.structs import replace

from flanneld_py.backends import backend_of
from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.pace import TokenBucket
from flanneld_py.core.records import decode, encode, fold
from flanneld_py.daemon import leaseground, leasekeeper, leasewriter
from flanneld_py.daemon.identity import Identity
from flanneld_py.daemon.inbox import Inbox, LeaseState, Levels, Network
from flanneld_py.daemon.leaseground import Awaited, LastRun
from flanneld_py.drivers import etcd as driver
from flanneld_py.drivers.etcdsettings import EtcdSettings
from flanneld_py.errors import LeaseGone, LeaseLost, Unreachable
from flanneld_py.model import Change, Changes, Entry, Host, NetworkConfig, OwnLease, Record, Snapshot
from tests.unit.model.etcdtwin import (
    NO_LEASE,
    TTL,
    UNREACHABLE,
    Event,
    Key,
    Reply,
    Request,
    reply_message,
    request_of,
)

PREFIX = "/m"
ROOT = b"/m/"
SUBNETS = b"/m/subnets/"
DUE, NOW, LATER = 0.0, 1.0, 1e9


class Seen(NamedTuple):
    """A record as a host knows it."""

    key: Key
    since: int


View: TypeAlias = tuple[Seen, ...]
Written: TypeAlias = tuple[str, str, int]
"""Key, value, etcd lease."""


class Brain(NamedTuple):
    """What the keeper remembers."""

    decided_on: tuple[Any, ...] = ()
    """Config, host, and the record or view that the last decision stood on; empty: none to rely on."""
    silent: tuple[tuple[str, int], ...] = ()
    probed: tuple[str, int] = ("", 0)
    renews: bool = False
    looks: bool = False
    writer_lease: int = 0
    writer_renews: bool = False
    ttl_settled: bool = False
    written: Written | None = None
    awaited: tuple[str, Seen | None] | None = None
    state: str = "none"
    own: Seen | None = None
    last: tuple[tuple[Any, ...], str, int, str] = ((), "", 0, "")
    failed: bool = False
    """The last step ended with an error of the registry: it is taken again soon."""


Saved: TypeAlias = tuple[Any, str, int, str]
"""Subnets, key, etcd lease, MAC."""


class Body(NamedTuple):
    """What the keeper finds around it."""

    host: Host
    host_name: tuple[Any, ...]
    """What tells this `host` from others, and from itself at another time."""
    network: Network
    config: str
    view: View
    saved: Saved | None
    node_id: str
    fixed_id: bool
    on_loss: Any


class Need(BaseException):
    """The step cannot go on without an answer. No Exception, which the keeper might take for its own."""

    def __init__(self, request: Request | tuple[str, int]) -> None:
        super().__init__(request)
        self.request = request


class Done(NamedTuple):
    brain: Brain
    node_id: str
    saved: Saved | None
    ended: bool = False
    """The process has ended, as the operator wants it when the subnet is another's."""


# --- values and objects: equal values are one object, as the daemon compares by identity ------------


@cache
def record_of(seen: Seen) -> Record:
    name = seen.key.name.removeprefix(ROOT).decode()
    entry = Entry(name, seen.key.value, seen.key.created, seen.key.modified, seen.key.lease)
    return replace(decode(entry), since_revision=seen.since)


def seen_of(record: Record) -> Seen:
    name = SUBNETS + record.key.encode()
    value = encode(record).encode()
    created, modified = record.create_revision, record.mod_revision
    return Seen(Key(name, value, created, modified, record.etcd_lease), record.since_revision)


@cache
def snapshot_of(view: View) -> Snapshot:
    records = [record_of(seen) for seen in view]
    return Snapshot(0, 1, {record.key: record for record in records})


@cache
def folded(view: View, events: tuple[Event, ...]) -> View:
    """The view after the events of one revision, by the daemon's own `fold`."""
    changes = []
    for event in events:
        key = event.key
        entry = key and Entry("", key.value, key.created, key.modified, key.lease)
        name = event.name.removeprefix(ROOT).decode()
        changes.append(Change(name, entry and replace(entry, key=name)))
    after = fold(snapshot_of(view), Changes(0, tuple(changes)))
    return tuple(sorted(seen_of(record) for record in after.records.values()))


@cache
def network_of(config_text: str, parse: Callable[[str], NetworkConfig]) -> Network:
    config = parse(config_text)
    return Network(config, backend_of(config), since="")


# --- what stands around the keeper ------------------------------------------------------------------


class _Inbox(Inbox):
    """Lets the keeper turn once."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = True

    @property
    def stopped(self) -> bool:
        return self.turned

    def wait(
        self,
        seen: int,
        until: float | None = None,  # noqa: ARG002
        *,
        first: bool = False,  # noqa: ARG002
    ) -> tuple[int, Levels]:
        self.turned = True
        return seen, self.levels

    def pause(self, seconds: float) -> None:
        pass


class _Registry(driver.EtcdRegistry):
    """Answers from a list; when that is at its end, the step is."""

    replies: tuple[Reply, ...] = ()
    given = 0
    failed = False

    def need(self, request: Request | tuple[str, int]) -> Reply:
        if self.given == len(self.replies):
            raise Need(request)
        self.given += 1
        return self.replies[self.given - 1]

    def _call(
        self,
        method: Callable[[Any], Any],  # noqa: ARG002 - see EtcdRegistry
        request: Any,
        seconds: float | None = None,  # noqa: ARG002
        attempts: int | None = None,  # noqa: ARG002
    ) -> Any:
        value = request_of(request)
        reply = self.need(value)
        if reply == UNREACHABLE:
            self.failed = True
            raise Unreachable("no answer")
        if reply == NO_LEASE:
            self.failed = True
            raise LeaseGone("requested lease not found")
        return reply_message(value, reply, 0)


class _Dice(random.Random):
    """What is to come up is asked for like an answer of etcd's."""

    def __init__(self, registry: _Registry) -> None:
        super().__init__(0)
        self.registry = registry

    def randrange(self, start: int, *_: Any) -> int:
        return int(self.registry.need(("choice", start))[0]) if start > 1 else 0

    def uniform(self, a: float, b: float) -> float:  # noqa: ARG002
        return b


class _Identity(Identity):
    def renew(self) -> str:
        self.node_id += "x"
        return self.node_id


class _Log:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Keepers:
    """Makes steps; all hosts share one keeper, as whatever it remembers is put in and taken out."""

    def __init__(self) -> None:
        self.saved: Saved | None = None
        self.registry = _Registry(EtcdSettings(("http://127.0.0.1:2379",), PREFIX))
        self.inbox = _Inbox()
        self.identity = _Identity("x")
        self.keeper = leasekeeper.LeaseKeeper(
            self.registry,
            self.inbox,
            self.identity,
            LastRun(),
            SimpleNamespace(save=self._save),  # type: ignore[arg-type]
            LeasePolicy(TTL),
            lambda: None,
        )
        self.writer = self.keeper._writer
        dice = _Dice(self.registry)
        vars(self.keeper).update(_log=_Log(), _rng=dice)
        vars(self.writer).update(_log=_Log(), _rng=dice)
        self.keeper._puts._rng = dice

    def step(
        self, body: Body, brain: Brain, decided_view: View, due: str, replies: tuple[Reply, ...]
    ) -> Done | Request | tuple[str, int]:
        """One turn of the keeper, or what it needs to know first.

        Args:
            body: what it finds.
            brain: what it remembers.
            decided_view: the view at its last step.
            due: the timer that is due: "", "renew", "look" or "await".
            replies: the answers that it has had in this step.
        """
        self.registry.replies, self.registry.given, self.registry.failed = replies, 0, False
        self._restore(body, brain, decided_view, due)
        try:
            self.keeper.run()
        except Need as need:
            return need.request
        except LeaseLost:
            return Done(Brain(), self.identity.node_id, self.saved, ended=True)
        assert self.registry.given == len(replies), "the same step asks the same"
        return Done(self._taken(body), self.identity.node_id, self.saved)

    def _save(self, record: Record, ground: Any, put_due: float) -> None:
        assert not put_due
        self.saved = (record.subnets, record.key, record.etcd_lease, ground.host.external.mac)

    # --- in and out

    def _restore(self, body: Body, brain: Brain, decided_view: View, due: str) -> None:
        keeper, writer = vars(self.keeper), vars(self.writer)
        self.saved = body.saved
        self.identity.node_id, self.identity.fixed = body.node_id, body.fixed_id
        policy = LeasePolicy(TTL, on_loss=body.on_loss)
        own = None if brain.own is None else OwnLease(record_of(brain.own), TTL if brain.own.key.lease else 0)
        config, name, basis = brain.decided_on or ("", (), "")
        decided_on = (
            body.network if config == body.config else None,
            body.host if name == body.host_name else None,
            record_of(basis)
            if isinstance(basis, Seen)
            else snapshot_of(decided_view)
            if basis == "view"
            else None,
        )
        key, seen = brain.awaited or ("", None)
        there = {key: record_of(seen)} if seen is not None else {}
        keeper.update(
            _last=LastRun(*brain.last),
            _policy=policy,
            _decided_on=decided_on if brain.decided_on else (),
            _silent=dict(brain.silent),
            _renew_at=(DUE if due == "renew" else LATER) if brain.renews else None,
            _look_at=(DUE if due == "look" else LATER) if brain.looks else None,
            _probed=(*brain.probed, DUE if due == "look" else LATER),
            _lacking=False,
            _renewed_at=NOW,
        )
        writer.update(
            _policy=policy,
            _bucket=TokenBucket(leasewriter.WRITE_BURST, leasewriter.WRITES_PER_SECOND, NOW),
            etcd_lease=brain.writer_lease,
            _renew_at=(DUE if due == "renew" else LATER) if brain.writer_renews else None,
            _ttl_settled=brain.ttl_settled,
            ready_at=0.0,
            written=None if brain.written is None else _written(*brain.written),
            awaited=Awaited(key, Snapshot(0, 1, there), DUE if due == "await" else LATER) if key else None,
            foreign=frozenset(),
        )
        lease = LeaseState(brain.state, own)  # type: ignore[arg-type]
        self.inbox.offer(network=body.network, host=body.host, snapshot=snapshot_of(body.view), lease=lease)
        self.inbox.turned = False

    def _taken(self, body: Body) -> Brain:
        keeper, writer = self.keeper, self.writer
        assert keeper._puts.at is None
        assert not writer.foreign
        assert vars(keeper).keys() == _OF_KEEPER, "what the keeper remembers has changed: so must Brain"
        assert vars(writer).keys() == _OF_WRITER
        lease, view = self.inbox.levels.lease, snapshot_of(body.view)
        decided: tuple[Any, ...] = keeper._decided_on
        if decided:
            network, host, basis = decided
            decided = (
                body.config if network is body.network else "old",
                body.host_name if host is body.host else (),
                seen_of(basis) if isinstance(basis, Record) else "view" if basis is view else "old",
            )
        awaited, wrote = writer.awaited, writer.written
        last = keeper._last
        return Brain(
            decided_on=decided,
            silent=tuple(sorted(keeper._silent.items())),
            probed=keeper._probed[:2],
            renews=keeper._renew_at is not None,
            looks=keeper._look_at is not None,
            writer_lease=writer.etcd_lease,
            writer_renews=writer._renew_at is not None,
            ttl_settled=writer._ttl_settled,
            written=None if wrote is None else (wrote.key, encode(wrote), wrote.etcd_lease),
            awaited=None if awaited is None else (awaited.key, _seen_at(awaited)),
            state=lease.state,
            own=None if lease.own is None else seen_of(lease.own.record),
            last=(last.previous, last.key, last.etcd_lease, last.mac),
            failed=self.registry.failed,
        )


_OF_KEEPER = {
    "_registry", "_inbox", "_identity", "_last", "_file", "_policy", "_distrust", "_log", "_backoff", "_rng",
    "_puts", "_decided_on", "_writer", "_silent", "_renew_at", "_renewed_at", "_look_at", "_probed",
    "_lacking",
}  # fmt: skip
_OF_WRITER = {
    "_registry", "_policy", "_rng", "_log", "_bucket", "etcd_lease", "_renew_at", "_ttl_settled", "ready_at",
    "written", "awaited", "foreign",
}  # fmt: skip


def _seen_at(awaited: Awaited) -> Seen | None:
    record = awaited.seen.records.get(awaited.key)
    return None if record is None else seen_of(record)


@cache
def _written(key: str, value: str, lease: int) -> Record:
    return decode(Entry(f"subnets/{key}", value.encode(), 0, 0, lease))


@contextmanager
def outside_time(keepers: Keepers) -> Iterator[None]:
    """Clock and randomness of the keeper's modules are those of the model."""
    chosen = SimpleNamespace(randbelow=lambda _: keepers.registry.need(("lease", 0))[0] - 1)
    with (
        patch.object(leasekeeper, "boottime", lambda: NOW),
        patch.object(leasewriter, "boottime", lambda: NOW),
        patch.object(leaseground, "boottime", lambda: NOW),
        patch.object(driver, "secrets", chosen),
    ):
        yield
