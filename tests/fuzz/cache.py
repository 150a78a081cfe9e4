"""The registry as an earlier run knew it: the file `registry` in the state directory, any text.

A right checksum is no proof, as anybody can make one: each input is read as it is, and with both put right.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from flanneld_py.core.linger import departures_since
from flanneld_py.core.records import SUBNETS_PREFIX, encode
from flanneld_py.core.records import snapshot as snapshot_of
from flanneld_py.core.registrycache import (
    Cached,
    DamagedError,
    Known,
    Origin,
    digest_of,
    parse,
    render,
    render_end,
)
from flanneld_py.errors import RecordError
from flanneld_py.model import Entry, Listing
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "/coreos.com/network"


def check(data: bytes) -> None:
    text = data.decode(errors="backslashreplace")  # as daemon/oldfiles.py reads files
    for whole in (text, _signed(text)):
        try:
            cached = parse(whole)
            snapshot = cached.snapshot()
        except DamagedError as error:
            one_line(error)
            continue
        _check_cached(cached)
        assert not cached.own or snapshot.records[cached.own].key == cached.own
        for key, record in snapshot.records.items():
            assert key == record.key
            encode(record)


def _signed(text: str) -> str:
    """The same with both digests right, where its last line is an object."""
    lines, newline, end_text = text.removesuffix("\n").rpartition("\n")
    try:
        end = json.loads(end_text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(end, dict):
        return text
    end.pop("sha256", None)
    try:
        end["content"] = hashlib.sha256((lines + newline).encode()).hexdigest()
        digest = hashlib.sha256(json.dumps(end, sort_keys=True).encode()).hexdigest()
        return f"{lines}{newline}{json.dumps({**end, 'sha256': digest})}\n"
    except (TypeError, RecursionError, UnicodeEncodeError):
        return text


def _check_cached(cached: Cached) -> None:
    assert math.isfinite(cached.time)
    assert 0 <= cached.revision < 1 << 63
    assert 0 <= cached.ttl < 1 << 63
    for part in (*cached.origin, cached.config, cached.own):
        part.encode()  # raises for half a character
    peers = cached.last_peers
    assert peers.held <= peers.peers.records.keys()
    for key in peers.peers.records:
        try:
            assert peers.peers.records[key].key == key
        except RecordError as error:
            one_line(str(error)[:300])
    fresh = snapshot_of(Listing(cached.revision + 1, cached.cluster_id, ()))
    gone = departures_since(peers.peers, fresh, "", 0.0, 60.0, peers.held)
    assert {record.key for record in gone.records} <= peers.peers.records.keys()


# --- seeds ----------------------------------------------------------------------------------------


def seeds() -> Iterator[bytes]:
    value = {"PublicIP": "192.0.2.2", "PublicIPv6": None, "BackendType": "host-gw"}
    entries = tuple(
        Entry(f"{SUBNETS_PREFIX}10.5.{n}.0-24", json.dumps(value).encode(), n, n, n) for n in range(1, 5)
    )
    snapshot = snapshot_of(Listing(9, 7, entries))
    peers = tuple(snapshot.records.values())[1:]
    origin = Origin(PREFIX, "node-1", "02:00:00:00:00:01")
    known = Known(origin, '{"Network": "10.5.0.0/16"}', "10.5.1.0-24", 86_400, snapshot, peers)
    lines = "".join(render(known))
    content = digest_of(lines)
    end = render_end(content, 9, 1_795_000_000.25)
    yield (lines + end).encode()
    yield lines.encode()
    yield (lines + end)[: len(lines) // 2].encode()
    for old, new in ODD:
        yield (lines + end).replace(old, new).encode()
    for revision, time in ((-1, 0.0), (1 << 70, 0.0), (9, float("nan")), (9, float("inf"))):
        yield (lines + render_end(content, revision, time)).encode()
    yield b""


ODD: tuple[tuple[str, str], ...] = (
    ('"peer"', '"held"'),
    ('"peer"', '"lord"'),
    ('"10.5.2.0-24"', '"10.5.2.1-24"'),
    ("192.0.2.2", "127.0.0.1"),
    ('"own": "10.5.1.0-24"', '"own": "10.5.9.0-24"'),
    ('"own": "10.5.1.0-24"', '"own": ""'),
    ('"ttl": 86400', '"ttl": true'),
    ("node-1", "\\ud800"),
    ('"format": 1', '"format": 2'),
    ("[", "[["),
)
WORDS: tuple[Any, ...] = (
    *(
        "format",
        "prefix",
        "node_id",
        "mac",
        "cluster_id",
        "config",
        "own",
        "ttl",
        "revision",
        "time",
        "content",
    ),
    *("sha256", "peer", "held", "other", "10.5.2.0-24", "NaN", "Infinity", "null", "\n"),
)
TARGET = Target(check, seeds, words=WORDS)
