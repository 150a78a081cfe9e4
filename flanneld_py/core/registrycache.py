"""The registry as this host last knew it: lines of JSON, a checksum. Discardable; never stronger than etcd.

It serves a start without etcd, and tells a peer that left from a registry that was wiped while no daemon ran
here. A line for each record, so that neither writing nor reading it holds up the other threads for long.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.core import gojson
from flanneld_py.core.records import SUBNETS_PREFIX, decode, encode
from flanneld_py.errors import RecordError
from flanneld_py.model import Entry, Record, Snapshot

FORMAT = 1
Role: TypeAlias = Literal["peer", "held", "other"]
"""`peer`: it was set up; `held`: the same, but its record had vanished together with many; `other`: all the
rest, our own among them."""


class DamagedError(ValueError):
    """The text is none that can be used; says why, as it continues "it …"."""


class Row(NamedTuple):
    """A record that is not decoded yet."""

    role: Role
    create_revision: int
    mod_revision: int
    since_revision: int
    etcd_lease: int
    value: str


class Rows(Mapping[str, Record]):
    """Records by key, decoded when they are asked for: of ten thousand mostly none is.

    `[]` raises RecordError for one that cannot be read.
    """

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = rows

    def __getitem__(self, key: str) -> Record:
        return _record(key, self._rows[key])

    def __contains__(self, key: object) -> bool:
        return key in self._rows  # also what cannot be read

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class LastPeers(NamedTuple):
    """The peers of the last run."""

    peers: Snapshot
    held: frozenset[str]
    """Keys of those that stayed although etcd had them no more."""
    created: Mapping[str, int]
    """Key of each record that etcd held, also of those that were no peer → its create_revision."""


class Origin(NamedTuple):
    """Whose knowledge it is."""

    prefix: str
    node_id: str
    mac: str
    """Of the external interface: a copy on another machine is worth nothing there."""


class Cached(Struct, frozen=True):
    """What stands in the file."""

    origin: Origin
    config: str
    """The network config that was in force, as it was written."""
    own: str
    """Key of our lease; empty: none was held."""
    ttl: int
    """Seconds for which it was granted; 0: for ever."""
    cluster_id: int
    revision: int
    time: float
    """When etcd last said so, in seconds since 1970."""
    rows: Mapping[str, Row]
    content: str
    """Digest of all but revision and time."""

    def snapshot(self) -> Snapshot:
        """All records that etcd held.

        Raises:
            DamagedError: our own cannot be read.
        """
        records: dict[str, Record] = {}
        for key, row in self.rows.items():
            if row.role != "held":
                with suppress(RecordError):  # of a version that took more
                    records[key] = _record(key, row)
        if self.own and self.own not in records:
            raise DamagedError("has a record of our own that cannot be read")
        return Snapshot(self.revision, self.cluster_id, records)

    @property
    def others(self) -> Rows:
        """The records that etcd held but for our own: what stands at that key now must prove itself."""
        return Rows({key: row for key, row in self.rows.items() if row.role != "held" and key != self.own})

    @property
    def last_peers(self) -> LastPeers:
        """The records that were set up, whether or not etcd still held them."""
        peers = Rows({key: row for key, row in self.rows.items() if row.role != "other"})
        held = frozenset(key for key, row in self.rows.items() if row.role == "held")
        created = {key: row.create_revision for key, row in self.rows.items() if row.role != "held"}
        return LastPeers(Snapshot(self.revision, self.cluster_id, peers), held, created)


class Known(Struct, frozen=True):
    """What is to be written: the registry as the kernel was set up by it."""

    origin: Origin
    config: str
    own: str
    ttl: int
    snapshot: Snapshot
    peers: tuple[Record, ...] = ()
    """Those that were set up."""
    held: frozenset[str] = field(default_factory=frozenset)
    """Keys of those among them that stay although etcd has them no more."""

    def same(self, other: Known) -> bool:
        """Whether it would make no difference in the file but for revision and time."""
        mine, its = self.snapshot, other.snapshot
        return (
            (self.origin, self.config, self.own, self.ttl, self.held, mine.cluster_id)
            == (other.origin, other.config, other.own, other.ttl, other.held, its.cluster_id)
            and mine.records == its.records
            and self.peers == other.peers
        )


def digest_of(lines: str) -> str:
    """Of all lines but the last one."""
    return hashlib.sha256(lines.encode()).hexdigest()


def render_end(content: str, revision: int, time: float) -> str:
    """The last line; `content` is the digest of all before it."""
    end = {"revision": revision, "time": time, "content": content}
    return json.dumps({**end, "sha256": _checksum(end)}) + "\n"


def render(known: Known) -> Iterator[str]:
    """All lines but the last one, one by one: other threads may want to do something in between."""
    head = {
        "format": FORMAT,
        "prefix": known.origin.prefix,
        "node_id": known.origin.node_id,
        "mac": known.origin.mac,
        "cluster_id": known.snapshot.cluster_id,
        "config": known.config,
        "own": known.own,
        "ttl": known.ttl,
    }
    yield json.dumps(head) + "\n"
    records, peers = known.snapshot.records, {record.key: record for record in known.peers}
    # By key, as the order in which they came is another after each start.
    for key in sorted(records):
        yield _line(records[key], "peer" if key in peers else "other")
    for key in sorted(known.held & (peers.keys() - records.keys())):
        yield _line(peers[key], "held")


def _line(record: Record, role: Role) -> str:
    row = Row(
        role,
        record.create_revision,
        record.mod_revision,
        record.since_revision,
        record.etcd_lease,
        encode(record),
    )
    return json.dumps((record.key, *row)) + "\n"


def parse(text: str) -> Cached:
    """Read the text of a file.

    Raises:
        DamagedError: it is not whole, of another version, or never was one.
    """
    lines, newline, end_text = text.removesuffix("\n").rpartition("\n")
    try:
        return _parse(lines + newline, json.loads(end_text))
    except DamagedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError("is damaged, cut off, or none of ours") from None


def _parse(lines: str, end: Any) -> Cached:
    head_text, _, rows_text = lines.partition("\n")
    head = json.loads(head_text)
    if head["format"] != FORMAT:
        raise DamagedError(f"is of format {gojson.show(head['format'])}, expected {FORMAT}")
    content = digest_of(lines)
    checksum = end.pop("sha256")
    if end["content"] != content or checksum != _checksum(end):
        raise DamagedError("is not as it was written: its checksum differs")
    rows = dict(_row(json.loads(line)) for line in rows_text.split("\n")[:-1])
    return _cached(head, end, rows, content)


def _cached(head: Any, end: Any, rows: Mapping[str, Row], content: str) -> Cached:
    """A right checksum is no proof of the types, as anybody can make one."""
    time = end["time"]
    if type(time) not in (int, float) or not math.isfinite(time):
        raise TypeError
    own = _text(head["own"])
    if own and (own not in rows or rows[own].role == "held"):
        raise DamagedError("lacks the record of our own lease")
    return Cached(
        origin=Origin(_text(head["prefix"]), _text(head["node_id"]), _text(head["mac"])),
        config=_text(head["config"]),
        own=own,
        ttl=_number(head["ttl"]),
        cluster_id=_number(head["cluster_id"], bits=64),
        revision=_number(end["revision"]),
        time=float(time),
        rows=rows,
        content=content,
    )


def _row(fields: Any) -> tuple[str, Row]:
    key, role, create, mod, since, lease, value = fields
    if role not in get_args(Role):
        raise TypeError
    row = Row(role, _number(create), _number(mod), _number(since), _number(lease), _text(value))
    return _text(key), row


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    value.encode()  # ValueError for half a character
    return value


def _number(value: Any, bits: int = 63) -> int:
    """As etcd has them, of which none is negative."""
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise TypeError
    return value


def _record(key: str, row: Row) -> Record:
    entry = Entry(
        f"{SUBNETS_PREFIX}{key}", row.value.encode(), row.create_revision, row.mod_revision, row.etcd_lease
    )
    return replace(decode(entry), since_revision=row.since_revision)


def _checksum(end: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(end, sort_keys=True).encode()).hexdigest()
