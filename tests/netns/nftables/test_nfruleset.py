"""The rules that are kept up to date are those of the kernel, whoever changes whatever meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers import nfruleset
from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.drivers.nfruleset import NfRuleset
from flanneld_py.packetfilter import ChainKey
from tests.netns.crowd import TABLE, crowding
from tests.netns.inside import Namespace
from tests.netns.nftables.rulesets import DOCKER, FIREWALLD, RESTORE, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns.inside import Agent

MANY = 3000
"""Rules that take some ten times as long to read as there is between two changes."""
LARGE = ChainKey("nft", "ip", "large", "c")


@pytest.fixture
def ruleset(net: Namespace, agent: Agent) -> Iterator[NfRuleset]:  # noqa: ARG001 - it is flushed before
    made = agent.make(NfRuleset)
    yield made
    made.close()


def test_each_change_is_seen(net: Namespace, reader: NfReader, ruleset: NfRuleset) -> None:
    assert ruleset.chains() == {}
    load(net, DOCKER, RESTORE["ip"])
    load(net, FIREWALLD)
    for change in (
        "add table ip t { chain c { drop; }; }",
        "add rule ip t c accept",
        "add set ip t s { type ipv4_addr; elements = { 192.0.2.1 }; }",
        "insert rule ip t c ip saddr @s drop",
        "add element ip t s { 192.0.2.2 }",
        "add chain inet firewalld filter_FORWARD { policy drop; }",
        "add table inet firewalld { flags dormant; }",
        "delete table ip t",
        "flush ruleset",
    ):
        net.run("nft", change)
        assert ruleset.chains() == reader.chains(), change


def set_patience(seconds: float) -> float:
    """In the child; what it was before."""
    before, nfruleset.PATIENCE = nfruleset.PATIENCE, seconds
    return before


def test_one_long_reading_is_no_sign_of_changes(net: Namespace, agent: Agent, ruleset: NfRuleset) -> None:
    """On a slow machine all rules took longer to read once than others' changes are waited for."""
    load(net, DOCKER, RESTORE["ip"])
    before = agent.call(set_patience, 0.0)
    try:
        assert ruleset.chains()
    finally:
        agent.call(set_patience, before)


def test_rules_are_read_although_somebody_adds_to_a_set_of_his_own_all_the_time(
    net: Namespace, ruleset: NfRuleset
) -> None:
    rules = "".join(f"ip saddr 10.{n >> 8}.{n & 255}.1 counter drop\n" for n in range(MANY))
    load(net, f"table ip large {{ chain c {{\n{rules}}}; }}\n{TABLE}")
    with crowding(net.entered("nft", "-i"), 0.002):
        for more in (1, 2):
            net.run("nft", "insert", "rule", "ip", "large", "c", "accept")
            assert len(ruleset.chains()[LARGE].rules) == MANY + more


def test_a_few_chains_are_read_as_they_are(net: Namespace, reader: NfReader) -> None:
    load(net, DOCKER, RESTORE["ip"])
    load(net, FIREWALLD)
    net.run("nft", "add table inet firewalld { flags dormant; }")
    everything = reader.chains()
    absent = [LARGE, LARGE._replace(table="nat"), LARGE._replace(where="legacy", table="filter")]
    for keys in (list(everything), list(everything)[::2], [], absent):
        assert reader.some([*keys, *absent]) == {key: everything[key] for key in keys if key in everything}
