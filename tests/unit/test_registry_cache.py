"""What an earlier run knew of the registry: whole or worth nothing, and never the cause of a failure."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.core.linger import departures_since
from flanneld_py.core.records import decode
from flanneld_py.core.registrycache import (
    Cached,
    DamagedError,
    Known,
    Origin,
    Row,
    Rows,
    digest_of,
    parse,
    render,
    render_end,
)
from flanneld_py.errors import RecordError
from flanneld_py.model import Entry, Record, Snapshot
from tests.unit.strategies import usual

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX = "/coreos.com/network"
CONFIG = '{"Network":"10.5.0.0/16", "Backend": {"Type": "vxlan"}}\n'
GO = (
    '{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}'
)
DUAL = '{"PublicIP":"192.0.2.8","PublicIPv6":"2001:db8::8","BackendType":"host-gw","NodeID":"eight"}'
TIME = 1795000000.25


def stored(key: str, value: str, revision: int = 4) -> Record:
    return decode(Entry(f"subnets/{key}", value.encode(), 3, revision, 5))


OWN = stored("10.5.1.0-24", GO.replace(".9", ".1").replace(":09", ":01"))
PEERS = (
    stored("10.5.9.0-24", GO),
    replace(stored("10.5.8.0-24&fd00:5:0:8::-64", DUAL, revision=9), since_revision=6),
    stored("0.0.0.0-0&fd00:5:0:7::-64", DUAL.replace("eight", "seven")),
)
HELD = stored("10.5.7.0-24", GO.replace(".9", ".7").replace(":09", ":07"))
SNAPSHOT = Snapshot(77, 2**64 - 1, {record.key: record for record in (OWN, *PEERS)})
KNOWN = Known(
    Origin(PREFIX, "node-1", "02:00:00:00:00:01"),
    CONFIG,
    OWN.key,
    86_400,
    SNAPSHOT,
    (*PEERS[:2], HELD),
    frozenset({HELD.key}),
)


def lines_of(known: Known) -> str:
    return "".join(render(known))


def text_of(known: Known, at: float = TIME) -> str:
    lines = lines_of(known)
    return lines + render_end(digest_of(lines), known.snapshot.revision, at)


TEXT = text_of(KNOWN)


def test_what_is_written_is_read_back() -> None:
    cached = parse(TEXT)
    assert (cached.origin, cached.config, cached.own, cached.ttl) == (
        KNOWN.origin,
        CONFIG,
        OWN.key,
        86_400,
    )
    assert (cached.revision, cached.cluster_id, cached.time) == (77, 2**64 - 1, TIME)
    snapshot = cached.snapshot()
    assert snapshot == SNAPSHOT
    assert snapshot.records[PEERS[1].key].since_revision == 6
    peers, held, _ = cached.last_peers
    assert dict(peers.records) == {record.key: record for record in KNOWN.peers}
    assert held == {HELD.key}
    assert cached.content == digest_of(lines_of(KNOWN))


def test_only_revision_and_time_make_no_other_content() -> None:
    later = replace(KNOWN, snapshot=replace(SNAPSHOT, revision=99))
    assert KNOWN.same(later)
    assert lines_of(KNOWN) == lines_of(later)
    backwards = dict(reversed([*SNAPSHOT.records.items()]))
    assert lines_of(replace(KNOWN, snapshot=replace(SNAPSHOT, records=backwards))) == lines_of(KNOWN)
    less = {record.key: record for record in (OWN, *PEERS[:2])}
    for other in (
        replace(KNOWN, config=CONFIG.strip()),
        replace(KNOWN, own=""),
        replace(KNOWN, ttl=5),
        replace(KNOWN, peers=KNOWN.peers[:1]),
        replace(KNOWN, held=frozenset()),
        replace(KNOWN, origin=KNOWN.origin._replace(mac="")),
        replace(KNOWN, snapshot=replace(SNAPSHOT, cluster_id=5)),
        replace(KNOWN, snapshot=replace(SNAPSHOT, records=less)),
    ):
        assert not KNOWN.same(other)
        assert lines_of(other) != lines_of(KNOWN)


def test_every_truncation_is_told_and_stops_nobody() -> None:
    for length in range(len(TEXT) - 1):
        with pytest.raises(DamagedError):
            parse(TEXT[:length])


@usual
@given(st.integers(0, len(TEXT) - 1), st.integers(32, 126))
def test_a_changed_byte_changes_no_value(position: int, byte: int) -> None:
    changed = TEXT[:position] + chr(byte) + TEXT[position + 1 :]
    try:
        found = parse(changed)
    except DamagedError:
        return
    # One blank for another in the last line, whose checksum is of its values.
    assert found == parse(TEXT)


def sealed(text: str) -> str:
    """With a last line that is right."""
    lines = text.rpartition("\n")[0].rpartition("\n")[0] + "\n"
    return lines + render_end(hashlib.sha256(lines.encode()).hexdigest(), 77, TIME)


def test_the_seal_of_these_tests_is_right() -> None:
    assert parse(sealed(TEXT)) == parse(TEXT)


@pytest.mark.parametrize(
    ("there", "instead", "reason"),
    [
        ('"format": 1', '"format": 0', "is of format 0, expected 1"),
        ('"format": 1', '"format": [9]', "is of format"),
        ('"prefix": "', '"prefix": 7, "x": "', "none of ours"),
        ('"ttl": 86400', '"ttl": -1', "none of ours"),
        ('"ttl": 86400', '"ttl": true', "none of ours"),
        ('"own": "10.5.1.0-24"', '"own": "10.5.2.0-24"', "lacks the record of our own lease"),
        ('"own": "10.5.1.0-24"', '"own": "10.5.7.0-24"', "lacks the record of our own lease"),
        ('"peer"', '"pear"', "none of ours"),
        (", 3, 4, 0, 5,", ", 3, 4, 0, 9223372036854775808,", "none of ours"),
        ("10.5.9.0-24", "\\ud800", "none of ours"),
    ],
)
def test_a_right_checksum_does_not_make_it_ours(there: str, instead: str, reason: str) -> None:
    assert there in TEXT
    with pytest.raises(DamagedError, match=reason.replace("[", r"\[")):
        parse(sealed(TEXT.replace(there, instead, 1)))


@pytest.mark.parametrize(
    "text", ["", "\n", "{}", "[]", "null\nnull\n", '"x"\n{}\n', "[" * 100_000, "\0" * 500, TEXT + TEXT]
)
def test_odd_texts_are_none(text: str) -> None:
    with pytest.raises(DamagedError):
        parse(text)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_time_that_is_none(odd: float) -> None:
    with pytest.raises(DamagedError):
        parse(text_of(KNOWN, odd))


def test_a_record_that_this_version_cannot_read_costs_that_record_only() -> None:
    cached = parse(sealed(TEXT.replace("192.0.2.9", "192.0.2.999", 1)))
    assert cached.snapshot().records.keys() == SNAPSHOT.records.keys() - {"10.5.9.0-24"}
    fresh = Snapshot(5, 1)  # another cluster: all are missed
    peers, held, _ = cached.last_peers
    departed = departures_since(peers, fresh, OWN.key, 0.0, 60.0, held)
    assert departed.kept.keys() == {PEERS[1].key, HELD.key}
    with pytest.raises(DamagedError, match="of our own that cannot be read"):
        parse(sealed(TEXT.replace("192.0.2.1", "192.0.2.999", 1))).snapshot()


def test_who_was_held_stays_held() -> None:
    """Alone that is no wipe, but it was part of one."""
    peers, held, _ = parse(TEXT).last_peers
    assert departures_since(peers, SNAPSHOT, OWN.key, 0.0, 60.0, held).held == [HELD.key]
    assert departures_since(peers, SNAPSHOT, OWN.key, 0.0, 60.0).held == []
    assert departures_since(peers, SNAPSHOT, OWN.key, 0.0, 0.0, held).held == []


HOSTS = 10_000


def crowd() -> Known:
    value = (
        '{"PublicIP":"198.18.%d.%d","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:05:00:%02x:%02x"},"NodeID":"%032x"}'
    )
    records = {}
    for n in range(HOSTS):
        high, low = n >> 8, n & 0xFF
        key = f"10.{64 + high}.{low}.0-24"
        text = value % (high, low, high, low, n)
        records[key] = decode(Entry(f"subnets/{key}", text.encode(), n + 5, n + 5, 7587848943239472601))
    own, *peers = records.values()
    snapshot = Snapshot(HOSTS + 5, 7, records)
    return Known(KNOWN.origin, CONFIG, own.key, 86_400, snapshot, tuple(peers))


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = act()
    return result, 1000 * (time.perf_counter() - began)


def test_ten_thousand_hosts(figure: Callable[[str], None]) -> None:
    known = crowd()
    text, render_ms = timed(lambda: text_of(known))
    cached, parse_ms = timed(lambda: parse(text))
    assert isinstance(cached, Cached)
    snapshot, decode_ms = timed(cached.snapshot)
    peers, held, _ = cached.last_peers
    _, compare_ms = timed(lambda: departures_since(peers, snapshot, known.own, 0.0, 60.0, held))
    assert snapshot == known.snapshot
    figure(
        f"state of {HOSTS:,} hosts: {len(text) / 1e6:.2f} MB; rendered in {render_ms:.0f} ms, read in "
        f"{parse_ms:.0f} ms, of that decoded, when etcd is away, in another {decode_ms:.0f} ms; compared "
        f"with the registry in {compare_ms:.0f} ms"
    )
    assert len(text) < 400 * HOSTS
    assert json.loads(text.partition("\n")[0])["own"] == known.own


def test_a_format_that_cannot_be_printed_is_named_so_that_it_can() -> None:
    with pytest.raises(DamagedError, match=r'^is of format "\\u007f\\n", expected 1$'):
        parse('{"format": "\\u007f\\n"}\n{}\n')


def test_whether_there_is_a_record_is_no_matter_of_reading_it() -> None:
    rows = Rows({OWN.key: Row("peer", 1, 1, 0, 1, "no JSON")})
    assert OWN.key in rows
    assert HELD.key not in rows
    with pytest.raises(RecordError):
        rows[OWN.key]
