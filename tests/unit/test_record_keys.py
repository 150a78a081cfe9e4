"""The keys of lease records: one spelling for each subnet."""

# ruff: noqa: N802 - tests bear the numbers of the specification

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import PerFamily, Subnets
from flanneld_py.core.records import format_key, parse_key
from flanneld_py.errors import RecordError
from tests.unit.strategies import all_subnets

V6_KEY = "0.0.0.0-0&fd00:5:34::-64"


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


@given(all_subnets())
def test_keys_round_trip(subnets: Subnets) -> None:
    assert parse_key(format_key(subnets)) == subnets


@given(st.text() | st.text("0123456789.-&:afd", max_size=30))
def test_any_text_is_a_canonical_key_or_a_record_error(text: str) -> None:
    try:
        subnets = parse_key(text)
    except RecordError:
        return
    assert format_key(subnets) == text
