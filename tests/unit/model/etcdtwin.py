"""etcd as the lease protocol sees it: keys with revisions, etcd leases, and transactions; all of it values.

It reads the very messages that the driver sends, guards and all: a wrong guard is a wrong answer here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

from flanneld_py.drivers import etcdrpc

FIRST_REVISION, FIRST_LEASE = 10_000, 1_000_000
"""Revisions and ids of etcd leases are told apart, and from all other numbers, by their size."""
TTL = 86_400


class Key(NamedTuple):
    """What stands at one key, which is named as etcd has it."""

    name: bytes
    value: bytes
    created: int
    modified: int
    lease: int


class Event(NamedTuple):
    """A put, or with no `key` a delete."""

    revision: int
    name: bytes
    key: Key | None


class Lease(NamedTuple):
    """An etcd lease that lives."""

    lease: int
    host: int
    """Who was granted it, or who has taken it over with its record."""


class Etcd(NamedTuple):
    keys: tuple[Key, ...] = ()
    leases: tuple[Lease, ...] = ()

    def key(self, name: bytes) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)

    def host_of(self, lease: int) -> int | None:
        return next((found.host for found in self.leases if found.lease == lease), None)


class Compare(NamedTuple):
    name: bytes
    end: bytes
    target: str
    result: str
    number: int


class Operation(NamedTuple):
    what: str
    name: bytes
    value: bytes = b""
    lease: int = 0


class Request(NamedTuple):
    """A message of the driver, as a value; `what`: grant, alive, ttl, revoke, get or txn."""

    what: str
    lease: int = 0
    name: bytes = b""
    guards: tuple[Compare, ...] = ()
    success: tuple[Operation, ...] = ()
    failure: tuple[Operation, ...] = ()


Reply: TypeAlias = tuple[Any, ...]
"""What etcd answers, as a value; `reply_message` makes of it what the driver reads."""
NO_LEASE: Reply = ("no such lease",)
UNREACHABLE: Reply = ("unreachable",)


def request_of(message: Any) -> Request:
    match type(message).__name__:
        case "LeaseGrantRequest":
            return Request("grant", int(message.ID))
        case "LeaseKeepAliveRequest":
            return Request("alive", int(message.ID))
        case "LeaseTimeToLiveRequest":
            return Request("ttl", int(message.ID))
        case "LeaseRevokeRequest":
            return Request("revoke", int(message.ID))
        case "RangeRequest":
            return Request("get", name=message.key)
        case "TxnRequest":
            return Request(
                "txn",
                guards=tuple(_compare(guard) for guard in message.compare),
                success=tuple(_operation(op) for op in message.success),
                failure=tuple(_operation(op) for op in message.failure),
            )
    raise AssertionError(f"the driver sends what the twin does not know: {message}")


def _compare(guard: Any) -> Compare:
    target = etcdrpc.Compare.CompareTarget.Name(guard.target)
    result = etcdrpc.Compare.CompareResult.Name(guard.result)
    number = {"VERSION": guard.version, "CREATE": guard.create_revision, "MOD": guard.mod_revision}[target]
    return Compare(guard.key, guard.range_end, target, result, int(number))


def _operation(op: Any) -> Operation:
    if op.HasField("request_put"):
        put = op.request_put
        assert not put.ignore_value
        return Operation("put", put.key, put.value, int(put.lease))
    if op.HasField("request_range"):
        return Operation("get", op.request_range.key)
    return Operation("delete", op.request_delete_range.key)


def answer(etcd: Etcd, request: Request, host: int, revision: int) -> tuple[Etcd, tuple[Event, ...], Reply]:
    """What etcd makes of a request of a host. `revision`: of the next write."""
    match request.what:
        case "grant":
            return etcd._replace(leases=(*etcd.leases, Lease(request.lease, host))), (), ("granted",)
        case "alive" | "ttl":
            return etcd, (), (TTL if etcd.host_of(request.lease) is not None else 0,)
        case "get":
            return etcd, (), (etcd.key(request.name),)
        case "txn":
            return _transact(etcd, request, host, revision)
    return (*end_lease(etcd, request.lease, revision), ("revoked",))


def end_lease(etcd: Etcd, lease: int, revision: int) -> tuple[Etcd, tuple[Event, ...]]:
    """With it go its keys, all at one revision."""
    gone = [key for key in etcd.keys if key.lease == lease]
    left = tuple(key for key in etcd.keys if key.lease != lease)
    leases = tuple(found for found in etcd.leases if found.lease != lease)
    return Etcd(left, leases), tuple(Event(revision, key.name, None) for key in gone)


def _transact(
    etcd: Etcd, request: Request, host: int, revision: int
) -> tuple[Etcd, tuple[Event, ...], Reply]:
    if not all(_holds(etcd, guard) for guard in request.guards):
        return etcd, (), (False, *(etcd.key(op.name) for op in request.failure))
    puts = [op for op in request.success if op.what == "put"]
    if any(op.lease and etcd.host_of(op.lease) is None for op in puts):
        return etcd, (), NO_LEASE
    events = []
    for op in request.success:
        old = etcd.key(op.name)
        rest = tuple(key for key in etcd.keys if key.name != op.name)
        if op.what == "put":
            created = old.created if old is not None else revision
            fresh = Key(op.name, op.value, created, revision, op.lease)
            etcd = etcd._replace(keys=tuple(sorted((*rest, fresh))))
            events.append(Event(revision, op.name, fresh))
            etcd = _handed_over(etcd, op.lease, host)
        elif old is not None:
            etcd = etcd._replace(keys=rest)
            events.append(Event(revision, op.name, None))
    return etcd, tuple(events), (True,)


def _handed_over(etcd: Etcd, lease: int, host: int) -> Etcd:
    """Who writes under an etcd lease that another host has left takes it over."""
    leases = tuple(found._replace(host=host) if found.lease == lease else found for found in etcd.leases)
    return etcd._replace(leases=leases)


def _holds(etcd: Etcd, guard: Compare) -> bool:
    """Whether all keys of a range, or the one key, which need not be there, are as a guard wants them."""
    if guard.end:
        found = [key for key in etcd.keys if guard.name <= key.name < guard.end]
    else:
        found = [etcd.key(guard.name) or Key(guard.name, b"", 0, 0, 0)]
    return all(_compared(key, guard) for key in found)


def _compared(key: Key, guard: Compare) -> bool:
    # Of the version only whether there is one matters: it is 0 for a key that is not there.
    there = {"VERSION": min(key.modified, 1), "CREATE": key.created, "MOD": key.modified}[guard.target]
    return {
        "EQUAL": there == guard.number,
        "NOT_EQUAL": there != guard.number,
        "LESS": there < guard.number,
        "GREATER": there > guard.number,
    }[guard.result]


def reply_message(request: Request, reply: Reply, revision: int) -> Any:
    """As gRPC would give it to the driver."""
    header = SimpleNamespace(revision=revision)
    match request.what:
        case "alive":
            return SimpleNamespace(TTL=reply[0])
        case "ttl":
            left = reply[0] or -1
            return SimpleNamespace(TTL=left, grantedTTL=TTL if reply[0] else 0, keys=reply[1:])
        case "get":
            return SimpleNamespace(kvs=[_kv(reply[0])] if reply[0] else [])
        case "txn":
            ranges = [SimpleNamespace(kvs=[_kv(key)] if key else []) for key in reply[1:]]
            responses = [SimpleNamespace(response_range=found) for found in ranges]
            return SimpleNamespace(header=header, succeeded=reply[0], responses=responses)
    return SimpleNamespace(header=header)


def _kv(key: Key) -> Any:
    return SimpleNamespace(
        key=key.name,
        value=key.value,
        create_revision=key.created,
        mod_revision=key.modified,
        lease=key.lease,
    )
