"""Chains that are to accept the overlay's traffic: what may be named, and what is advised."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from flanneld_py.core.acceptin import check_chain, cure, missing
from flanneld_py.core.drops import Drop, Flow
from flanneld_py.packetfilter import Chain, ChainKey

FORWARD = ChainKey("nft", "ip", "filter", "FORWARD")
DOCKER_USER = FORWARD._replace(chain="DOCKER-USER")
FIREWALLD = ChainKey("nft", "inet", "firewalld", "filter_FORWARD")
FLOW = Flow("to there", ip_address("10.5.1.0"), ip_address("10.5.2.0"), None, None)


@pytest.mark.parametrize("text", ["DOCKER-USER", "FORWARD", "inet firewalld filter_FORWARD", "ip6 x y.z"])
def test_a_chain(text: str) -> None:
    check_chain(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a chain"),
        ("DOCKER USER", "expected a chain"),
        ("FORWARD,DOCKER-USER", "give the flag once for each"),
        ("arp filter INPUT", "FAMILY one of ip, ip6, inet"),
        ("ip nat POSTROUTING", "lets nothing pass"),
        ("ip filter x;flush", "expected a chain"),
        ("ÜBER", "expected a chain"),
        ("FLANNEL-FWD", "our own rules"),
        ("ip flannel-ipv4 forward", "our own rules"),
    ],
)
def test_what_can_be_no_such_chain(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_chain(text)


@pytest.mark.parametrize(
    ("base", "wanted", "said"),
    [
        (FORWARD, (), 'let it pass there, or set --forward-accept-in="DOCKER-USER"'),
        (FORWARD, ("DOCKER-USER",), 'let it pass there, or set --forward-accept-in="FORWARD"'),
        (FIREWALLD, (), 'let it pass there, or set --forward-accept-in="inet firewalld filter_FORWARD"'),
        (FIREWALLD, ("inet firewalld filter_FORWARD",), "let it pass there"),
        (FORWARD, ("DOCKERUSER",), "--forward-accept-in names DOCKERUSER, which is not there (yet); "),
    ],
)
def test_advice_names_a_chain_that_helps(base: ChainKey, wanted: tuple[str, ...], said: str) -> None:
    """With DOCKERUSER given, it was `name one of its chains by --forward-accept-in`."""
    chains = dict.fromkeys((FORWARD, DOCKER_USER, FIREWALLD), Chain())
    assert cure([Drop(FLOW, base, base, "policy drop")], wanted, chains).startswith(said)


def test_missing() -> None:
    assert missing(("DOCKER-USER", "DOCKERUSER"), {DOCKER_USER: Chain()}) == ("DOCKERUSER",)
