"""Lease records: keys and values as Go flannel writes them, and snapshots that no bad value can shrink."""

# ruff: noqa: N802, S104 - tests bear the numbers of the specification; 0.0.0.0 is a value here, not bound

from __future__ import annotations

import json
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.records import (
    MAX_VALUE,
    config_entry,
    decode,
    encode,
    fold,
    format_key,
    parse_key,
    snapshot,
    why_unreachable,
)
from flanneld_py.errors import RecordError
from flanneld_py.model import Change, Changes, Entry, Listing, PerFamily, Record, Snapshot, Subnets

V4_KEY = "10.5.34.0-24"
DUAL_KEY = "10.5.34.0-24&fd00:5:34::-64"
V6_KEY = "0.0.0.0-0&fd00:5:34::-64"
VXLAN = {
    "PublicIP": "192.0.2.10",
    "PublicIPv6": None,
    "BackendType": "vxlan",
    "BackendData": {"VNI": 1, "VtepMAC": "82:4b:b1:2c:8f:a1"},
}
PLAIN = '{"PublicIP":"1.2.3.4","PublicIPv6":null}'


def entry(value: str | bytes | dict[str, Any], key: str = V4_KEY, revision: int = 7) -> Entry:
    text = json.dumps(value) if isinstance(value, dict) else value
    data = text if isinstance(text, bytes) else text.encode()
    return Entry(f"subnets/{key}", data, create_revision=3, mod_revision=revision, etcd_lease=9)


def refusal(value: str | bytes | dict[str, Any], key: str = V4_KEY) -> str:
    with pytest.raises(RecordError) as caught:
        decode(entry(value, key))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300
    return message


# --- keys -----------------------------------------------------------------------------------------


def test_T01_ipv4_key() -> None:
    subnets = parse_key("10.12.13.0-24")
    assert subnets == PerFamily(IPv4Network("10.12.13.0/24"))
    assert format_key(subnets) == "10.12.13.0-24"


def test_T02_dual_stack_key() -> None:
    subnets = parse_key("10.12.13.0-24&fd00:12:13::-56")
    assert subnets == PerFamily(IPv4Network("10.12.13.0/24"), IPv6Network("fd00:12:13::/56"))
    assert format_key(subnets) == "10.12.13.0-24&fd00:12:13::-56"


@pytest.mark.parametrize("key", ["10", "10.12.13.0", "10.12.13-24", "10.12.13.300-24", "10.12.13.0-24hi"])
def test_T03_no_keys(key: str) -> None:
    with pytest.raises(RecordError):
        parse_key(key)


@pytest.mark.parametrize("key", ["255.255.255.255-32", "garbage", ""])
def test_T04_no_keys_either(key: str) -> None:
    with pytest.raises(RecordError):
        parse_key(key)


def test_ipv6_only_key() -> None:
    assert parse_key(V6_KEY) == PerFamily(None, IPv6Network("fd00:5:34::/64"))
    assert format_key(PerFamily(None, IPv6Network("fd00:5:34::/64"))) == V6_KEY


@pytest.mark.parametrize(
    "key",
    [
        "0.0.0.0-0",
        "10.5.34.1-24",
        "10.5.34.0-024",
        "10.5.034.0-24",
        "10x5.34.0-24",
        "foo10.5.34.0-24",
        "10.5.34.0-24\n",
        " 10.5.34.0-24",
        "10.5.34.0-24&",
        "10.5.34.0-24&fd00:5:34::-128",
        "10.5.34.0-24&fd00:5:34::-0",
        "10.5.34.0-24&::-0",
        "10.5.34.0-24&fd00:5:34::1-64",
        "10.5.34.0-24&FD00:5:34::-64",
        "10.5.34.0-24&fd00:5:34:0::-64",
        "10.5.34.0-24&fd00:5:34::-064",
        "10.5.34.0-24&::ffff:1.2.3.4-64",
        "fd00:5:34::-64",
        "foo/10.5.34.0-24",
        "\u0661\u0660.5.34.0-24",
        "10.5.34.0-24\udcff",
    ],
)
def test_spellings_that_are_refused(key: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_key(key)
    assert str(caught.value).isprintable()


def test_the_reason_names_what_is_wrong() -> None:
    with pytest.raises(RecordError, match=r"10\.5\.34\.1-24 is no subnet key: .*has host bits set"):
        parse_key("10.5.34.1-24")
    with pytest.raises(RecordError, match=r"not in canonical form: expected 10\.5\.34\.0-24&fd00:5:34::-64"):
        parse_key("10.5.34.0-24&fd00:5:34:0::-64")


V4_NETWORKS = st.builds(
    lambda base, length: IPv4Network((base >> 32 - length << 32 - length, length)),
    st.integers(0, 2**32 - 1),
    st.integers(1, 31),
)
V6_NETWORKS = st.builds(
    lambda base, length: IPv6Network((base >> 128 - length << 128 - length, length)),
    st.integers(0, 2**128 - 1),
    st.integers(1, 127),
)
SUBNETS: st.SearchStrategy[Subnets] = st.builds(PerFamily, V4_NETWORKS, st.none() | V6_NETWORKS) | st.builds(
    PerFamily, st.none(), V6_NETWORKS
)


@given(SUBNETS)
def test_keys_round_trip(subnets: Subnets) -> None:
    assert parse_key(format_key(subnets)) == subnets


@given(st.text() | st.text("0123456789.-&:afd", max_size=30))
def test_any_text_is_a_canonical_key_or_a_record_error(text: str) -> None:
    try:
        subnets = parse_key(text)
    except RecordError:
        return
    assert format_key(subnets) == text


# --- values ---------------------------------------------------------------------------------------


def test_vxlan_record() -> None:
    assert decode(entry(VXLAN)) == Record(
        key=V4_KEY,
        subnets=PerFamily(IPv4Network("10.5.34.0/24")),
        public_ips=PerFamily(IPv4Address("192.0.2.10")),
        backend_type="vxlan",
        backend_data=PerFamily({"VNI": 1, "VtepMAC": "82:4b:b1:2c:8f:a1"}),
        vtep_macs=PerFamily("82:4b:b1:2c:8f:a1"),
        create_revision=3,
        mod_revision=7,
        etcd_lease=9,
    )


def test_T09_T11_T15_addresses_come_back_as_text() -> None:
    value = {"PublicIP": "1.2.3.4", "PublicIPv6": "fc00:0:0::1"}
    record = decode(entry(value, DUAL_KEY))
    assert record.public_ips == PerFamily(IPv4Address("1.2.3.4"), IPv6Address("fc00::1"))
    assert encode(record) == '{"PublicIP":"1.2.3.4","PublicIPv6":"fc00::1"}'


def test_T23_value_to_the_byte() -> None:
    record = Record("10.1.5.0-24", PerFamily(IPv4Network("10.1.5.0/24")), PerFamily(IPv4Address("1.2.3.4")))
    assert encode(record) == PLAIN


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (V4_KEY, PLAIN),
        (V4_KEY, '{"PublicIP":"1.2.3.4","PublicIPv6":null,"NodeID":"abc"}'),
        (
            V4_KEY,
            '{"PublicIP":"192.0.2.10","PublicIPv6":null,"BackendType":"vxlan",'
            '"BackendData":{"VNI":1,"VtepMAC":"82:4b:b1:2c:8f:a1"}}',
        ),
        (
            DUAL_KEY,
            '{"PublicIP":"192.0.2.10","PublicIPv6":"2001:db8::10","BackendType":"vxlan",'
            '"BackendData":{"VNI":1,"VtepMAC":"82:4b:b1:2c:8f:a1"},'
            '"BackendV6Data":{"VNI":1,"VtepMAC":"82:4b:b1:2c:8f:a2"},"NodeID":"abc"}',
        ),
        (
            V6_KEY,
            '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::10","BackendType":"vxlan",'
            '"BackendV6Data":{"VNI":1,"VtepMAC":"82:4b:b1:2c:8f:a2"}}',
        ),
        (V4_KEY, '{"PublicIP":"192.0.2.10","PublicIPv6":null,"BackendType":"host-gw"}'),
        (
            V4_KEY,
            '{"PublicIP":"192.0.2.10","PublicIPv6":null,"BackendType":"extension","BackendData":"text"}',
        ),
    ],
)
def test_values_to_the_byte_and_back(key: str, text: str) -> None:
    assert encode(decode(entry(text, key))) == text


def test_keys_match_in_any_case_and_unknown_ones_mean_nothing() -> None:
    text = (
        '{"publicip":"1.1.1.1","PUBLICIP":"1.2.3.4","backendTYPE":"VXLAN","New":[1e999],'
        '"backenddata":{"vtepmac":"82:4B:B1:2C:8F:A1"},"nodeid":"x"}'
    )
    record = decode(entry(text))
    assert record.public_ips.v4 == IPv4Address("1.2.3.4")
    assert (record.backend_type, record.node_id) == ("vxlan", "x")
    assert record.vtep_macs == PerFamily("82:4b:b1:2c:8f:a1")


def test_null_is_absence_where_go_takes_it_so() -> None:
    text = '{"PublicIP":"1.2.3.4","BackendType":"udp","BackendType":null,"BackendData":null,"NodeID":null}'
    record = decode(entry(text))
    assert (record.backend_type, record.backend_data, record.node_id) == ("udp", PerFamily(), "")


def test_addresses_of_a_family_not_in_use_are_left_out() -> None:
    assert decode(entry({"PublicIP": "1.2.3.4", "PublicIPv6": "::1"})).public_ips == PerFamily(
        IPv4Address("1.2.3.4")
    )
    assert decode(entry({"PublicIPv6": "fc00::1"}, V6_KEY)).public_ips == PerFamily(
        None, IPv6Address("fc00::1")
    )


@pytest.mark.parametrize(
    "text",
    [
        "82:4b:b1:2c:8f:a1",
        "82:4B:B1:2C:8F:A1",
        "82-4b-b1-2c-8f-a1",
        "82-4B-B1-2C-8F-A1",
        "824b.b12c.8fa1",
        "824B.B12C.8FA1",
    ],
)
def test_mac_forms(text: str) -> None:
    record = decode(entry(VXLAN | {"BackendData": {"VNI": 1, "VtepMAC": text}}))
    assert record.vtep_macs == PerFamily("82:4b:b1:2c:8f:a1")


@pytest.mark.parametrize(
    "mac",
    [
        *(
            "",
            None,
            5,
            "82:4b:b1:2c:8f",
            "82:4b:b1:2c:8f:a1:00",
            "824bb12c8fa1",
            "82:4b:b1:2c:8f-a1",
            "82:4b:b1:2c:8f:g1",
        ),
        *(
            "2:4b:b1:2c:8f:a1",
            "82:4b:b1:2c:8f:a1\n",
            "824b-b12c-8fa1",
            "82.4b.b1.2c.8f.a1",
            "00:00:00:00:00:00",
        ),
        *("01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "0000.0000.0000", "٨2:4b:b1:2c:8f:a1"),
    ],
)
def test_macs_refused(mac: Any) -> None:
    message = refusal(VXLAN | {"BackendData": {"VNI": 1, "VtepMAC": mac}})
    assert message.startswith("BackendData.VtepMAC ")
    assert "expected a" in message


def test_vxlan_needs_a_mac_for_each_family() -> None:
    assert refusal({"PublicIP": "1.2.3.4", "BackendType": "vxlan"}).startswith(
        "BackendData null: expected an object"
    )
    dual = VXLAN | {"PublicIPv6": "fc00::1"}
    assert refusal(dual, DUAL_KEY).startswith("BackendV6Data null: expected an object")
    assert (
        decode(entry(dual | {"BackendV6Data": VXLAN["BackendData"]}, DUAL_KEY)).vtep_macs.v6
        == "82:4b:b1:2c:8f:a1"
    )
    assert (
        decode(entry({"PublicIP": "1.2.3.4", "BackendType": "host-gw", "BackendData": 5})).vtep_macs
        == PerFamily()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PublicIP": "2001:db8::1"}, 'PublicIP "2001:db8::1": expected an IPv4 address'),
        ({"PublicIP": None}, "PublicIP null: expected an IPv4 address"),
        ({"PublicIP": ""}, 'PublicIP "": expected'),
        ({"PublicIP": 16909060}, "PublicIP 16909060: expected"),
        ({"PublicIP": "1.2.3.04"}, 'PublicIP "1.2.3.04": expected'),
        (
            {"PublicIP": "0.0.0.0"},
            "PublicIP 0.0.0.0 is unspecified: expected the address of the host that holds 10.5.34.0/24",
        ),
        ({"PublicIP": "127.0.0.1"}, "PublicIP 127.0.0.1 is a loopback address"),
        ({"PublicIP": "224.0.0.1"}, "PublicIP 224.0.0.1 is a multicast address"),
        ({"PublicIP": "255.255.255.255"}, "PublicIP 255.255.255.255 is the broadcast address"),
        ({"PublicIPv6": ""}, 'PublicIPv6 "": expected an IPv6 address or null'),
        ({"PublicIPv6": "1.2.3.4"}, 'PublicIPv6 "1.2.3.4": expected'),
        ({"PublicIPv6": "fe80::1%eth0"}, 'PublicIPv6 "fe80::1%eth0": expected'),
        ({"PublicIPv6": []}, r"PublicIPv6 \[\]: expected"),
        ({"BackendType": 1}, "BackendType 1: expected the name of a backend"),
        ({"BackendType": "a\nb"}, r'BackendType "a\\nb": expected'),
        ({"BackendData": "x"}, 'BackendData "x": expected an object'),
        ({"NodeID": "a" * 65}, "NodeID .*: expected at most 64 of"),
        ({"NodeID": "a b"}, 'NodeID "a b": expected at most 64 of'),
        ({"NodeID": 5}, "NodeID 5: expected"),
    ],
)
def test_values_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=f"^{message}"):
        decode(entry(VXLAN | change))
    refusal(VXLAN | change)


@pytest.mark.parametrize("address", ["::", "::1", "ff02::1", "::ffff:1.2.3.4", None])
def test_ipv6_addresses_refused(address: str | None) -> None:
    assert refusal({"PublicIP": "0.0.0.0", "PublicIPv6": address}, V6_KEY).startswith("PublicIPv6 ")


@pytest.mark.parametrize(
    "address", ["192.0.2.1", "10.0.0.1", "169.254.7.7", "2001:db8::1", "fd00::1", "fe80::1"]
)
def test_addresses_taken(address: str) -> None:
    assert why_unreachable(IPv6Address(address) if ":" in address else IPv4Address(address)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("not-a-subnet", PLAIN),
        (V4_KEY, ""),
        (V4_KEY, "[]"),
        (V4_KEY, "null"),
        (V4_KEY, "{}"),
        (V4_KEY, '{"PublicIP":"2001:db8::1"}'),
        (V4_KEY, PLAIN[:-1]),
        (V4_KEY, PLAIN.encode("utf-16")),
        (V4_KEY, b'{"PublicIP":"1.2.3.4","x":"\xff"}'),
        (V4_KEY, '{"PublicIP":"1.2.3.4","x":' + "[" * 65 + "]" * 65 + "}"),
        (V4_KEY, "[" * 60_000),
        (V4_KEY, '{"PublicIP":"1.2.3.4","x":NaN}'),
        (V4_KEY, '{"PublicIP":"1.2.3.4","x":"' + "y" * 70_000 + '"}'),
    ],
)
def test_T28_malformed_entries(key: str, value: str | bytes) -> None:
    refusal(value, key)


def test_the_longest_value() -> None:
    text = f'{PLAIN[:-1]},{" " * (MAX_VALUE - len(PLAIN) - 8)}"x":123}}'
    assert len(text) == MAX_VALUE
    decode(entry(text))
    assert refusal(text + " ").startswith("the value has 65537 bytes: expected at most 65536")


def test_repeated_keys_are_each_checked() -> None:
    assert refusal('{"PublicIP":null,"PublicIP":"1.2.3.4"}').startswith("PublicIP null")
    assert refusal('{"PublicIP":"1.2.3.4","NodeID":"a b","NodeID":"c"}').startswith('NodeID "a b"')


FIELD_NAMES = [
    "PublicIP",
    "PublicIPv6",
    "BackendType",
    "BackendData",
    "BackendV6Data",
    "NodeID",
    "VtepMAC",
    "x",
]
JSON_KEYS = st.sampled_from([*FIELD_NAMES, *map(str.lower, FIELD_NAMES)]) | st.text(max_size=4)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1.2.3.4", "fc00::1", "vxlan", "82:4b:b1:2c:8f:a1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_KEYS, inner, max_size=3),
    max_leaves=5,
)
DOCUMENTS = st.builds(
    lambda base, members: json.dumps(base | members),
    st.sampled_from([{}, {"PublicIP": "1.2.3.4", "PublicIPv6": "fc00::1"}, VXLAN]),
    st.dictionaries(JSON_KEYS, JSON_VALUES, max_size=4),
)


@given(st.sampled_from([V4_KEY, DUAL_KEY, V6_KEY]), DOCUMENTS.map(str.encode) | st.binary())
def test_any_value_gives_a_record_or_a_record_error(key: str, value: bytes) -> None:
    try:
        record = decode(entry(value, key))
    except RecordError as error:
        message = str(error)
    else:
        message = ""
    assert message.isprintable()
    if message:
        return
    assert [family for family, _ in record.public_ips.items()] == [
        family for family, _ in record.subnets.items()
    ]
    assert decode(entry(encode(record), key)) == record


V4_ADDRESSES = st.ip_addresses(v=4).filter(lambda address: why_unreachable(address) is None)
V6_ADDRESSES = st.ip_addresses(v=6).filter(lambda address: why_unreachable(address) is None)
MACS = st.binary(min_size=5, max_size=5).map(lambda octets: (b"\x02" + octets).hex(":"))


@st.composite
def records(draw: st.DrawFn) -> Record:
    subnets = draw(SUBNETS)
    backend = draw(st.sampled_from(["", "vxlan", "host-gw"]))
    macs = PerFamily(
        draw(MACS) if backend == "vxlan" and subnets.v4 else None,
        draw(MACS) if backend == "vxlan" and subnets.v6 else None,
    )
    return Record(
        key=format_key(subnets),
        subnets=subnets,
        public_ips=PerFamily(
            draw(V4_ADDRESSES) if subnets.v4 else None, draw(V6_ADDRESSES) if subnets.v6 else None
        ),
        backend_type=backend,
        backend_data=PerFamily(
            {"VNI": 1, "VtepMAC": macs.v4} if macs.v4 else None,
            {"VNI": 1, "VtepMAC": macs.v6} if macs.v6 else None,
        ),
        vtep_macs=macs,
        node_id=draw(st.from_regex(r"[A-Za-z0-9_.-]{0,64}", fullmatch=True)),
        create_revision=3,
        mod_revision=7,
        etcd_lease=9,
    )


@given(records())
def test_records_round_trip(record: Record) -> None:
    text = encode(record)
    assert " " not in text
    assert list(json.loads(text))[:2] == ["PublicIP", "PublicIPv6"]
    assert (list(json.loads(text))[-1] == "NodeID") == bool(record.node_id)
    assert decode(entry(text, record.key)) == record


# --- snapshots ------------------------------------------------------------------------------------

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
    small = min(_seconds(1_000) for _ in range(3))
    large = min(_seconds(8_000) for _ in range(2))
    assert large < 24 * small
