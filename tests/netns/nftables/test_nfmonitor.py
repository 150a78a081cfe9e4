"""What is heard of changes in a real kernel's rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers.nfmonitor import NfMonitor, Touched
from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.errors import KernelError
from tests.netns.inside import Namespace
from tests.netns.nftables.rulesets import IPTABLES, NFT, RESTORE, filled, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns.inside import Agent

SOON = 5.0
"""Seconds within which what was done before must be heard."""
QUIET = 0.1
"""Seconds to listen when nothing is expected: the kernel notifies while it carries out a change."""


@pytest.fixture
def monitor(net: Namespace, agent: Agent) -> Iterator[NfMonitor]:  # noqa: ARG001 - it is flushed before
    made = agent.make(NfMonitor)
    yield made
    made.close()


def test_every_edit_is_heard_with_its_table_and_command(net: Namespace, monitor: NfMonitor) -> None:
    load(net, filled(NFT, "ip"))
    assert monitor.wait(SOON) == Touched(frozenset({("ip", "flannel")}), commands=frozenset({"nft"}))
    load(net, filled(IPTABLES, "ip6"), RESTORE["ip6"])
    touched = monitor.wait(SOON)
    assert touched is not None
    assert touched.tables == {("ip6", "nat"), ("ip6", "filter")}
    assert len(touched.commands) == 1
    assert next(iter(touched.commands)).startswith("ip6tables")
    for edit in (
        "add rule ip flannel forward drop",
        "flush chain ip flannel forward",
        "add set ip flannel s { type ipv4_addr; }",
        "add element ip flannel s { 192.0.2.1 }",
        "delete table ip flannel",
    ):
        net.run("nft", *edit.split())
        assert monitor.wait(SOON) == Touched(frozenset({("ip", "flannel")}), commands=frozenset({"nft"})), (
            edit
        )
    net.run("nft", "flush", "ruleset")
    touched = monitor.wait(SOON)
    assert touched is not None
    assert touched.tables == {("ip6", "nat"), ("ip6", "filter")}


def test_what_changes_nothing_and_what_is_not_routed_wakes_nobody(
    net: Namespace, reader: NfReader, monitor: NfMonitor
) -> None:
    reader.chains()
    net.run("nft", "list", "ruleset")
    load(net, "table arp t { chain c { drop; }; }\ntable netdev t { }")
    assert monitor.wait(QUIET) is None


def test_lost_notifications_are_told_and_got_over(net: Namespace, monitor: NfMonitor) -> None:
    text = "x" * 110
    rule = " ".join([f'log prefix "{text}"'] * 4) + f' comment "{text}"\n'
    load(net, "table ip big {\n chain c {\n" + 50_000 * rule + " }\n}\ndelete table ip big\n")
    touched = monitor.wait(SOON)
    assert touched is not None
    assert touched.overflow
    assert monitor.wait(0) is None
    net.run("nft", "add", "table", "ip", "t")
    assert monitor.wait(SOON) == Touched(frozenset({("ip", "t")}), commands=frozenset({"nft"}))


def test_who_may_not_listen_is_told(net: Namespace) -> None:
    agent = net.agent("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    with pytest.raises(KernelError, match=r"cannot listen to the kernel: .*needs CAP_NET_ADMIN"):
        agent.make(NfMonitor)
