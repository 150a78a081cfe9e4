"""Lease records: keys and values as Go flannel writes them."""

# ruff: noqa: N802, S104 - tests bear the numbers of the specification; 0.0.0.0 is a value here, not bound

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import PerFamily
from flanneld_py.core.records import (
    LONGEST_SHOWN,
    MAX_VALUE,
    decode,
    encode,
    format_key,
    shortened,
    why_unreachable,
)
from flanneld_py.errors import RecordError
from flanneld_py.model import Entry, Record
from tests.unit.strategies import all_subnets

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


def test_T09_T11_addresses_come_back_as_text() -> None:
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
    subnets = draw(all_subnets())
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


def test_what_is_too_long_to_be_shown() -> None:
    assert shortened("x" * LONGEST_SHOWN) == "x" * LONGEST_SHOWN
    assert shortened("x" * 5_000) == "x" * LONGEST_SHOWN + "…"
