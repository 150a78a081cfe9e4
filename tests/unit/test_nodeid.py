"""Node ids and VTEP MACs: stable, distinct, and never the machine id itself."""

# ruff: noqa: N802 - tests bear the numbers of the specification

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.nodeid import check_node_id, derive_node_id, is_node_id, vtep_mac
from flanneld_py.errors import HostError, UsageError

MACHINE_ID = "0123456789abcdef0123456789abcdef"
HEX = st.text("0123456789abcdef", min_size=32, max_size=32)


def test_derived_as_openssl_computes_it() -> None:
    # printf flanneld-py | openssl dgst -sha256 -hmac 0123456789abcdef0123456789abcdef
    assert derive_node_id(f"{MACHINE_ID}\n") == "f839ba28967c0c138fa2c1cb59ac037d"


@given(HEX, HEX)
def test_distinct_hosts_have_distinct_ids_that_hide_the_machine_id(one: str, other: str) -> None:
    node_id = derive_node_id(one)
    assert is_node_id(node_id)
    assert node_id != one
    assert (derive_node_id(other) == node_id) == (one == other)


@pytest.mark.parametrize("text", ["", "\n", "uninitialized\n", MACHINE_ID[:-1], f"{MACHINE_ID}0", "g" * 32])
def test_a_placeholder_machine_id_is_refused(text: str) -> None:
    with pytest.raises(HostError, match=r"/etc/machine-id .*expected 32 hex digits.*--node-id"):
        derive_node_id(text)


@pytest.mark.parametrize("text", ["a", "node-1.example_x", "A" * 64])
def test_node_ids_taken(text: str) -> None:
    assert check_node_id(text) == text


@pytest.mark.parametrize("text", ["", "a" * 65, "a b", "a/b", "a\n", "ä", "a\0"])
def test_node_ids_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--node-id .*expected 1 to 64"):
        check_node_id(text)


def test_mac_as_openssl_computes_it() -> None:
    # sha256 of node, NUL, /coreos.com/network, NUL, flannel.1, NUL, 0; first octet made 02 in its low bits
    assert vtep_mac("node", "/coreos.com/network", "flannel.1") == "56:75:e6:04:7a:4d"


@given(st.text(), st.text(), st.text(), st.integers(0, 1000))
def test_T16_macs_are_local_and_unicast(node_id: str, prefix: str, device: str, salt: int) -> None:
    mac = vtep_mac(node_id, prefix, device, salt)
    octets = [int(octet, 16) for octet in mac.split(":")]
    assert len(octets) == 6
    assert mac == ":".join(f"{octet:02x}" for octet in octets)
    assert octets[0] & 0b11 == 0b10
    assert mac == vtep_mac(node_id, prefix, device, salt)


def test_macs_differ_by_every_argument() -> None:
    variants = [
        ("n", "p", "d", 0),
        ("m", "p", "d", 0),
        ("n", "q", "d", 0),
        ("n", "p", "e", 0),
        ("n", "p", "d", 1),
    ]
    assert len({vtep_mac(*variant) for variant in variants}) == len(variants)
    assert vtep_mac("ab", "c", "d") != vtep_mac("a", "bc", "d")
