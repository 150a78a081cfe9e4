"""The state file: whole or worth nothing, and never the cause of a failure."""

from __future__ import annotations

import hashlib
import json
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.statefile import SavedState, parse_state, render_state
from tests.unit.strategies import NETWORKS, subnet, thorough, usual

STATE = SavedState(
    prefix="/coreos.com/network",
    node_id="0123456789abcdef0123456789abcdef",
    networks=(NETWORKS[4], NETWORKS[6]),
    subnets=PerFamily(subnet(4, 7), subnet(6, 7)),
    etcd_lease=7587848943239472601,
    mac="02:00:00:00:00:07",
    mac_seed="0123456789abcdef",
    put_due=1795000000.25,
)
TEXT = render_state(STATE)

v4_networks = st.builds(
    lambda base, length: IPv4Network((base, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
v6_networks = st.builds(
    lambda base, length: IPv6Network((base, length), strict=False),
    st.integers(0, 2**128 - 1),
    st.integers(0, 128),
)
saved_states = st.builds(
    SavedState,
    prefix=st.text(max_size=20),
    node_id=st.text(max_size=20),
    networks=st.lists(v4_networks | v6_networks, max_size=4).map(tuple),
    subnets=st.builds(PerFamily, st.none() | v4_networks, st.none() | v6_networks),
    etcd_lease=st.integers(0, 2**63 - 1),
)


@usual
@given(saved_states)
def test_what_was_saved_is_read(state: SavedState) -> None:
    assert parse_state(render_state(state)) == state


def test_every_truncation_is_nothing() -> None:
    assert parse_state(TEXT) == STATE
    assert TEXT.endswith("}\n")
    # The newline at the end says nothing.
    for length in range(len(TEXT) - 1):
        assert parse_state(TEXT[:length]) is None, length


@thorough
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 127))
def test_a_changed_byte_changes_no_value(position: int, byte: int) -> None:
    # One blank for another is the same document.
    changed = TEXT[:position] + chr(byte) + TEXT[position + 1 :]
    assert parse_state(changed) == (STATE if blank_for_blank(position, byte) else None)


def blank_for_blank(position: int, byte: int) -> bool:
    outside_text = TEXT[:position].count('"') % 2 == 0
    return chr(byte) == TEXT[position] or (
        outside_text and TEXT[position] in " \n" and chr(byte) in " \t\r\n"
    )


def test_every_flipped_bit_of_every_value_is_noticed() -> None:
    for position, character in enumerate(TEXT):
        for bit in range(7):
            found = parse_state(TEXT[:position] + chr(ord(character) ^ 1 << bit) + TEXT[position + 1 :])
            assert found is None or found == STATE
            assert found is None or character in " \n"


@usual
@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    ).map(json.dumps)
)
def test_any_other_text_is_nothing(text: str) -> None:
    assert parse_state(text) is None


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", '"sha256"', "{}", '{"sha256": 1}', "\0", "9" * 5000, "[" * 200_000, TEXT + TEXT],
)
def test_odd_texts_are_nothing(text: str) -> None:
    assert parse_state(text) is None


@pytest.mark.parametrize(
    "part",
    [
        {"networks": [5]},
        {"subnets": [True]},
        {"prefix": 5},
        {"node_id": None},
        {"etcd_lease": "7"},
        {"networks": 5},
        {"mac_seed": 5},
        {"put_due": "soon"},
        {"put_due": True},
        {"put_due": float("nan")},
        {"put_due": float("inf")},
        {"put_due": 10**400},
        {"put_due": -1.0},
        {"mac": 5},
        {"etcd_lease": 1 << 63},
        {"mac_seed": "\ud800"},
    ],
)
def test_a_right_checksum_does_not_make_it_ours(part: dict[str, Any]) -> None:
    body = {**json.loads(TEXT), **part}
    del body["sha256"]
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    assert parse_state(json.dumps({**body, "sha256": checksum})) is None


def test_an_unknown_format_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flanneld_py.core.statefile.FORMAT", 2)
    assert parse_state(TEXT) is None
    assert parse_state(render_state(STATE)) == STATE


def test_the_order_of_keys_does_not_matter_and_their_values_do() -> None:
    body = json.loads(TEXT)
    assert parse_state(json.dumps(dict(reversed(body.items())))) == STATE
    for key in body:
        assert parse_state(json.dumps({**body, key: "x"})) is None
        assert parse_state(json.dumps({name: value for name, value in body.items() if name != key})) is None


def test_different_states_have_different_texts() -> None:
    variants = [
        replace(STATE, prefix="/x"),
        replace(STATE, node_id="x"),
        replace(STATE, networks=(ip_network("10.6.0.0/16"),)),
        replace(STATE, subnets=PerFamily(subnet(4, 8))),
        replace(STATE, etcd_lease=1),
        replace(STATE, mac_seed="other"),
        replace(STATE, put_due=0.0),
    ]
    assert len({render_state(state) for state in (STATE, *variants)}) == len(variants) + 1
