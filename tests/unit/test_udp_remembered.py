"""What a pump worked with comes back whole or not at all; what a manager keeps is taken by name."""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import IPNetwork, PerFamily
from flanneld_py.core.ownership import tun_name
from flanneld_py.daemon.fdstore import take_kept
from flanneld_py.datapath import Endpoint, PumpSettings
from flanneld_py.model import HostFacts, LinkFacts
from flanneld_py.udp.remembered import Remembered, parse, render
from flanneld_py.udp.resume import cut
from flanneld_py.udp.tunnel import packed
from tests.unit.strategies import subnet, usual

SETTINGS = PumpSettings(
    address=IPv4Address("192.0.2.1"),
    port=8285,
    subnets=PerFamily(subnet(4, 1), subnet(6, 1)),
    networks=(ip_network("10.5.0.0/16"), ip_network("fd00:5::/48")),
    mtu=1472,
    plane="python",
    source_check="strict",
)


def rows(numbers: dict[int, bool]) -> dict[IPNetwork, Endpoint]:
    """Peer → whether it takes IPv6."""
    found: dict[IPNetwork, Endpoint] = {}
    for number, ipv6 in numbers.items():
        end = Endpoint(IPv4Address(f"192.0.2.{number}"), 8285, ipv6)
        found |= {subnet(4, number): end, subnet(6, number): end}
    return found


def remembered(whole: bytes) -> Remembered | None:
    found = cut(whole)
    return parse(found) if found is not None else None


@usual
@given(st.dictionaries(st.integers(2, 250), st.booleans(), max_size=20))
def test_all_of_it_comes_back(numbers: dict[int, bool]) -> None:
    peers = rows(numbers)
    whole = render("/p", "flannel0", SETTINGS, packed(SETTINGS, peers))
    found = remembered(whole + b"what an earlier, longer one left behind")
    assert found == Remembered("/p", "flannel0", SETTINGS, peers)


@usual
@given(st.data())
def test_half_of_it_is_nothing(data: st.DataObject) -> None:
    """The writer may be killed between any two bytes."""
    new = render("/p", "flannel0", SETTINGS, packed(SETTINGS, rows({2: True})))
    old = render("/p", "flannel0", SETTINGS, packed(SETTINGS, rows({3: False, 4: True})))
    done = data.draw(st.integers(0, len(new)))
    found = remembered(new[:done] + old[done:])
    assert found in (None, remembered(new), remembered(old))
    assert remembered(new[:done]) in (None, remembered(new))


@usual
@given(st.binary(max_size=200))
def test_anything_else_is_nothing(garbage: bytes) -> None:
    assert remembered(garbage) is None


def test_what_overlaps_is_left_for_the_reconciler() -> None:
    peers: dict[IPNetwork, Endpoint] = {
        IPv4Network("10.5.8.0/22"): Endpoint(IPv4Address("192.0.2.8"), 8285, ipv6=False),
        IPv4Network("10.5.9.0/24"): Endpoint(IPv4Address("192.0.2.9"), 8285, ipv6=False),
    }
    found = remembered(render("/p", "flannel0", SETTINGS, packed(SETTINGS, peers)))
    assert found is not None
    assert found.rows[IPv4Network("10.5.9.0/24")] == peers[IPv4Network("10.5.9.0/24")]


# --- kept descriptors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pid", "fds"), [("1", "2"), ("", "2"), (str(os.getpid()), ""), (str(os.getpid()), "x")]
)
def test_descriptors_of_another_process_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, pid: str, fds: str
) -> None:
    for name, value in (("LISTEN_PID", pid), ("LISTEN_FDS", fds), ("LISTEN_FDNAMES", "a:b")):
        monkeypatch.setenv(name, value)
    assert take_kept() == {}
    assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & os.environ.keys(), (
        "no child may take them either"
    )


# --- names ----------------------------------------------------------------------------------------


def facts(aliases: dict[str, str]) -> HostFacts:
    return HostFacts(
        tuple(
            LinkFacts(name, index, 1472, "", up=True, kind="tun", alias=alias)
            for index, (name, alias) in enumerate(aliases.items(), 2)
        )
    )


@pytest.mark.parametrize(
    ("aliases", "name"),
    [
        ({}, "flannel0"),
        ({"flannel0": "flanneld-py:/ours"}, "flannel0"),
        ({"flannel0": "flanneld-py:/other"}, "flannel1"),
        ({"flannel0": "flanneld-py:/other", "flannel1": "flanneld-py:/third"}, "flannel2"),
        ({"flannel0": "flanneld-py:/other", "flannel7": "flanneld-py:/ours"}, "flannel7"),
        # Somebody else's, perhaps flannel's: that is a conflict to be told, not to be dodged.
        ({"flannel0": ""}, "flannel0"),
        ({"flannel0": "foo"}, "flannel0"),
        # Ours under a name that is no longer one of ours.
        ({"lost0": "flanneld-py:/ours"}, "flannel0"),
    ],
)
def test_a_host_has_one_tun_for_each_prefix(aliases: dict[str, str], name: str) -> None:
    assert tun_name(facts(aliases), "/ours") == name
