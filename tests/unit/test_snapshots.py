"""Snapshots of all records, by listing and by events: no bad value can shrink them."""

from __future__ import annotations

import gc
import json
import time
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.admit import admit
from flanneld_py.core.records import config_entry, decode, fold, said_since, snapshot
from flanneld_py.model import Change, Changes, Entry, Listing, Snapshot
from tests.unit import strategies
from tests.unit.strategies import thorough

PLAIN = '{"PublicIP":"1.2.3.4","PublicIPv6":null}'
VXLAN = {
    "PublicIP": "192.0.2.10",
    "PublicIPv6": None,
    "BackendType": "vxlan",
    "BackendData": {"VNI": 1, "VtepMAC": "82:4b:b1:2c:8f:a1"},
}
KEYS = [f"10.5.{third}.0-24" for third in range(4)]


def good(key: str, revision: int, created: int | None = None) -> Entry:
    value = f'{{"PublicIP":"192.0.2.{revision % 250 + 1}","PublicIPv6":null}}'.encode()
    return Entry(f"subnets/{key}", value, created or revision, revision, revision)


def broken(key: str, revision: int, created: int | None = None) -> Entry:
    return Entry(f"subnets/{key}", b"garbage", created or revision, revision, revision)


def put(what: Entry) -> Change:
    return Change(what.key, what)


def delete(key: str) -> Change:
    return Change(f"subnets/{key}", None)


def test_snapshot_takes_records_only() -> None:
    foreign = [
        Entry("config", b"{}"),
        Entry("subnets", PLAIN.encode()),
        Entry("subnets-x/10.5.9.0-24", PLAIN.encode()),
        Entry("flanneld-py/x", b""),
    ]
    strange = [
        Entry("subnets/", PLAIN.encode()),
        Entry("subnets/x/10.5.8.0-24", PLAIN.encode()),
        broken(KEYS[1], 5),
    ]
    listing = Listing(12, 77, (*foreign, good(KEYS[0], 4), *strange))
    found = snapshot(listing)
    assert (found.revision, found.cluster_id) == (12, 77)
    assert found.records == {KEYS[0]: decode(good(KEYS[0], 4))}
    assert set(found.bad) == {"", "x/10.5.8.0-24", KEYS[1]}
    assert found.bad[KEYS[1]].startswith("the value is not JSON")
    assert config_entry(listing) is foreign[0]
    assert config_entry(Listing(1, 1, ())) is None


def test_a_sign_of_life_moves_the_revision_and_nothing_else() -> None:
    """Else the next change would be looked for among all records."""
    start = fold(snapshot(Listing(5, 77, (good(KEYS[0], 4),))), Changes(6, (put(good(KEYS[1], 6)),)))
    quiet = fold(start, Changes(9, ()))
    assert (quiet.revision, quiet.since) == (9, start.since)
    assert quiet.records is start.records
    after = fold(quiet, Changes(10, (delete(KEYS[0]),)))
    assert after.since is not None
    assert after.since[0] is start.records


def test_fold_puts_and_deletes() -> None:
    start = snapshot(Listing(5, 77, (good(KEYS[0], 4), good(KEYS[1], 5), broken(KEYS[3], 5))))
    changes = (
        put(good(KEYS[2], 6)),
        delete(KEYS[0]),
        delete(KEYS[3]),
        Change("config", Entry("config", b"?")),
    )
    found = fold(start, Changes(8, changes))
    assert (found.revision, found.cluster_id) == (8, 77)
    assert set(found.records) == {KEYS[1], KEYS[2]}
    assert found.records[KEYS[1]] is start.records[KEYS[1]]
    assert found.bad == {}
    assert set(start.records) == {KEYS[0], KEYS[1]}
    assert set(start.bad) == {KEYS[3]}


def test_a_bad_put_keeps_the_last_good_record_and_is_told() -> None:
    start = snapshot(Listing(5, 77, (good(KEYS[0], 4),)))
    spoiled = fold(start, Changes(6, (put(broken(KEYS[0], 6, created=4)),)))
    assert spoiled.records[KEYS[0]] is start.records[KEYS[0]]
    assert set(spoiled.bad) == {KEYS[0]}
    worse = fold(spoiled, Changes(7, (put(broken(KEYS[0], 7, created=4)),)))
    assert worse.records[KEYS[0]] is start.records[KEYS[0]]
    healed = fold(worse, Changes(8, (put(good(KEYS[0], 8, created=4)),)))
    assert healed.records[KEYS[0]].mod_revision == 8
    assert healed.bad == {}
    gone = fold(worse, Changes(8, (delete(KEYS[0]),)))
    assert (gone.records, gone.bad) == ({}, {})


def test_a_bad_put_after_a_delete_keeps_nothing() -> None:
    start = snapshot(Listing(5, 77, (good(KEYS[0], 4),)))
    found = fold(start, Changes(7, (delete(KEYS[0]), put(broken(KEYS[0], 7)))))
    assert (found.records, set(found.bad)) == ({}, {KEYS[0]})


def test_a_listing_keeps_the_last_good_record_too() -> None:
    start = snapshot(Listing(5, 77, (good(KEYS[0], 4), good(KEYS[1], 5))))
    found = snapshot(Listing(9, 77, (broken(KEYS[0], 8, created=4), broken(KEYS[1], 9))), start)
    assert found.records == {KEYS[0]: start.records[KEYS[0]]}
    assert set(found.bad) == {KEYS[0], KEYS[1]}
    assert snapshot(Listing(9, 77, ()), start).records == {}


def test_a_listing_of_another_history_is_read_afresh_but_drops_nobody() -> None:
    start = snapshot(Listing(5, 77, (good(KEYS[0], 4), good(KEYS[1], 5))))
    other_value = good(KEYS[0], 4).value.replace(b"192.0.2.5", b"192.0.2.99")
    renewed = Entry(f"subnets/{KEYS[0]}", other_value, 4, 4, 4)
    for listing, replaced in (
        (Listing(9, 78, (renewed, broken(KEYS[1], 9))), False),
        (Listing(4, 77, (renewed, broken(KEYS[1], 3))), False),
        (Listing(9, 77, (renewed, broken(KEYS[1], 9))), True),
    ):
        found = snapshot(listing, start, replaced=replaced)
        assert found.epoch == start.epoch + 1
        assert fold(found, Changes(20, (delete(KEYS[0]),))).epoch == found.epoch
        assert snapshot(Listing(30, listing.cluster_id, ()), found).epoch == found.epoch
        assert found.records[KEYS[0]].public_ips.v4 == IPv4Address("192.0.2.99")
        assert set(found.bad) == {KEYS[1]}
        assert found.records[KEYS[1]] is start.records[KEYS[1]]


def test_unchanged_records_are_the_same_objects() -> None:
    entries = tuple(good(key, revision) for revision, key in enumerate(KEYS, 1))
    start = snapshot(Listing(5, 77, entries))
    found = snapshot(Listing(9, 77, (*entries[:3], good(KEYS[3], 9, created=4))), start)
    for key in KEYS[:3]:
        assert found.records[key] is start.records[key]
    assert found.records[KEYS[3]] is not start.records[KEYS[3]]
    again = snapshot(Listing(5, 77, entries), start)
    assert all(again.records[key] is start.records[key] for key in KEYS)


def test_a_record_written_anew_is_as_old_as_what_it_says() -> None:
    key = KEYS[0]
    text, other = good(key, 4).value, good(key, 8).value
    folded = listed = snapshot(Listing(5, 77, (good(key, 4),)))
    steps = [(6, text, 4), (7, text, 4), (8, other, 8), (9, b"garbage", 8), (10, other, 8), (11, text, 11)]
    for revision, value, since in steps:
        entry = Entry(f"subnets/{key}", value, 4, revision, 1)
        folded = fold(folded, Changes(revision, (put(entry),)))
        listed = snapshot(Listing(revision, 77, (entry,)), listed)
        for found in (folded.records[key], listed.records[key]):
            assert (found.since_revision or found.mod_revision) == since
    anew = Entry(f"subnets/{key}", text, 12, 12, 1)
    assert fold(folded, Changes(12, (put(anew),))).records[key].since_revision == 0, "another host's, perhaps"
    replaced = snapshot(Listing(30, 78, (Entry(f"subnets/{key}", text, 4, 30, 1),)), folded)
    assert replaced.records[key].since_revision == 0, "revisions of another history say nothing"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["good", "good", "bad", "delete", "foreign"]), st.sampled_from(KEYS), st.booleans()
    ),
    max_size=25,
)


@given(STEPS, STEPS)
def test_fold_over_any_split_equals_the_listing(
    before: list[tuple[str, str, bool]], after: list[tuple[str, str, bool]]
) -> None:
    store: dict[str, Entry] = {}
    last_good: dict[str, Entry] = {}
    revision = 0

    def step(verb: str, key: str) -> Change:
        nonlocal revision
        revision += 1
        if verb == "foreign":
            return Change("subnets-other", Entry("subnets-other", b"x", revision, revision))
        if verb == "delete":
            store.pop(key, None)
            last_good.pop(key, None)
            return delete(key)
        created = store[key].create_revision if key in store else revision
        store[key] = (good if verb == "good" else broken)(key, revision, created)
        if verb == "good":
            last_good[key] = store[key]
        return put(store[key])

    for verb, key, _ in before:
        step("good" if verb == "bad" else verb, key)
    folded = first = snapshot(Listing(revision, 77, tuple(store.values())))
    batch: list[Change] = []
    for verb, key, ends_batch in after:
        batch.append(step(verb, key))
        if ends_batch:
            folded = fold(folded, Changes(revision, tuple(batch)))
            batch = []
    folded = fold(folded, Changes(revision, tuple(batch)))
    listing = Listing(revision, 77, tuple(store.values()))

    assert folded == Snapshot(
        revision,
        77,
        {key: decode(kept) for key, kept in last_good.items()},
        {
            key: "the value is not JSON: Expecting value at line 1, column 1"
            for key in store
            if store[key].value == b"garbage"
        },
    )
    assert snapshot(listing, folded) == folded
    relisted = snapshot(listing, first)
    assert relisted.bad == folded.bad
    for key, record in folded.records.items():
        if key not in folded.bad:
            assert relisted.records[key] == record


def _seconds(count: int) -> float:
    entries = tuple(
        Entry(f"subnets/10.{i >> 8}.{i & 255}.0-24", json.dumps(VXLAN).encode(), i, i, i)
        for i in range(1, count + 1)
    )
    begun = time.process_time()
    found = snapshot(Listing(count, 77, entries))
    for change in range(1, 20):
        fold(found, Changes(count + change, (put(entries[change]),)))
    spent = time.process_time() - begun
    assert len(found.records) == count
    return spent


def test_the_effort_is_linear() -> None:
    """Quadratic work would take 64 times as long for 8 times the records."""
    gc.disable()  # what the tests before have left would be looked through as well
    try:
        small = min(_seconds(1_000) for _ in range(3))
        large = min(_seconds(8_000) for _ in range(3))
    finally:
        gc.enable()
    assert large < 24 * small


# --- whatever anybody writes ----------------------------------------------------------------------

PEERS = [
    Entry(
        f"subnets/10.5.{number}.0-24",
        json.dumps({**VXLAN, "PublicIP": f"192.0.2.{number}", "BackendData": {"VtepMAC": mac}}).encode(),
        number,
        number,
        1,
    )
    for number in (1, 2, 3, 4)
    for mac in (strategies.mac(number),)
]
"""The first is ours."""
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["vxlan", "192.0.2.2"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(sorted(VXLAN)), inner),
    max_leaves=6,
)
ADDRESSES = st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.9", "10.5.2.7", "0.0.0.0", "255.255.255.255"])  # noqa: S104 - a value, not bound
MACS = st.sampled_from([strategies.mac(1), strategies.mac(2), strategies.mac(9), "00:00:00:00:00:00", "x"])
NEARLY_GOOD = st.builds(
    lambda ip, mac: json.dumps({**VXLAN, "PublicIP": ip, "BackendData": {"VtepMAC": mac}}), ADDRESSES, MACS
)
VALUES = st.binary(max_size=60) | (st.builds(json.dumps, JSON) | NEARLY_GOOD).map(str.encode)
ANY_KEYS = st.binary(max_size=30) | st.builds(
    lambda third, length, v6: f"10.5.{third}.0-{length}{v6}".encode(),
    st.integers(0, 6),
    st.integers(12, 32),
    st.sampled_from(["", "&fd00:5:0:2::-64", "&", "\xff"]),
)


@thorough
@given(st.lists(st.tuples(ANY_KEYS, VALUES), max_size=6))
def test_whatever_bytes_anybody_writes_the_peers_stay(writes: list[tuple[bytes, bytes]]) -> None:
    start = snapshot(Listing(10, 77, tuple(PEERS)))
    own, host, config = start.records["10.5.1.0-24"], strategies.host(1), strategies.config()
    before = admit(start, own, config, host, "vxlan").accepted
    assert len(before) == 3
    entries: dict[str, Entry] = {}
    for revision, (key, value) in enumerate(writes, 11):
        # As the etcd driver decodes keys.
        name = f"subnets/{key.decode('utf-8', 'backslashreplace')}"
        if name.removeprefix("subnets/") not in start.records:
            entries[name] = Entry(name, value, revision, revision, 1)
    changes = Changes(30, tuple(put(entry) for entry in entries.values()))
    for found in (fold(start, changes), snapshot(Listing(30, 77, (*PEERS, *entries.values())))):
        peers = admit(found, own, config, host, "vxlan")
        assert peers.accepted[:3] == before
        names = {name.removeprefix("subnets/") for name in entries}
        assert found.bad.keys() | peers.rejected.keys() | {p.key for p in peers.accepted[3:]} == names
        assert all(reason.isprintable() for reason in (*found.bad.values(), *peers.rejected.values()))


# --- what the last run knew -------------------------------------------------------------------------


def test_a_restart_takes_who_was_written_again_for_as_old_as_before() -> None:
    """Else two that share a MAC would change places with it: the one that says so for longer has it."""
    first = replace_value(good(KEYS[0], 4), PLAIN)
    again = Entry(first.key, first.value, 4, 9, 9)
    ran = fold(snapshot(Listing(4, 1, (first,))), Changes(9, (put(again),)))
    restarted = snapshot(Listing(9, 1, (again,)), last_run=ran.records)
    assert said_since(restarted.records[KEYS[0]]) == said_since(ran.records[KEYS[0]]) == 4
    assert said_since(snapshot(Listing(9, 1, (again,))).records[KEYS[0]]) == 9
    changed = replace_value(again, PLAIN.replace("1.2.3.4", "1.2.3.5"))
    assert said_since(snapshot(Listing(9, 1, (changed,)), last_run=ran.records).records[KEYS[0]]) == 9


def test_a_restart_keeps_the_last_good_value_of_a_key_that_was_not_deleted_since() -> None:
    known = snapshot(Listing(4, 1, (good(KEYS[0], 4),))).records
    found = snapshot(Listing(9, 1, (broken(KEYS[0], 9, created=4),)), last_run=known)
    assert (found.records, set(found.bad)) == (known, {KEYS[0]})
    assert snapshot(Listing(9, 1, (broken(KEYS[0], 9, created=7),)), last_run=known).records == {}


def replace_value(entry: Entry, text: str) -> Entry:
    return Entry(entry.key, text.encode(), entry.create_revision, entry.mod_revision, entry.etcd_lease)
