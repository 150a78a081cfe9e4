"""The packed table of the udp data plane: longest prefix, what it holds, and that C takes no other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanneld_py.addresses import IPAddress, IPNetwork, PerFamily
from flanneld_py.udp import reference
from flanneld_py.udp.table import Here, Peer, SourceCheck, pack
from tests.unit.packetcore import Core

OWN: PerFamily[IPNetwork] = PerFamily(ip_network("10.5.7.0/24"), ip_network("fd05:0:0:7::/64"))
TUN: PerFamily[IPAddress] = PerFamily(ip_address("10.5.7.0"), ip_address("fd05:0:0:7::"))
NETWORKS = (ip_network("10.5.0.0/16"), ip_network("fd05::/48"))
HERE = Here(OWN, TUN, NETWORKS, 1472)


@pytest.fixture(scope="module")
def core() -> Iterator[Core]:
    core = Core()
    yield core
    core.close()


def owner(peers: list[Peer], address: IPAddress) -> IPv4Address | None:
    """The peer of the longest prefix; of equal ones the first."""
    if address in (OWN.v4 if address.version == 4 else OWN.v6 or ()):  # type: ignore[operator]
        return None
    fitting = [(net.prefixlen, peer) for peer in peers for net in peer.subnets if address in net]
    longest = max((length for length, _ in fitting), default=0)
    return next((peer.address for length, peer in fitting if length == longest), None)


@st.composite
def subnets(draw: st.DrawFn) -> IPNetwork:
    """Few bits are free, so that they nest and repeat."""
    if draw(st.booleans()):
        length = draw(st.integers(18, 32))
        return IPv4Network((0x0A050000 | draw(st.integers(0, 15)) << 7, length), strict=False)
    length = draw(st.sampled_from([50, 60, 64, 65, 66, 128]))
    return IPv6Network(((0xFD05 << 112) | draw(st.integers(0, 31)) << 62, length), strict=False)


PEERS = st.lists(
    st.builds(
        Peer,
        st.integers(1, 6).map(lambda low: IPv4Address(f"192.0.2.{low}")),
        st.lists(subnets(), max_size=4).map(tuple),
        st.just(8285),
        st.booleans(),
    ),
    max_size=6,
)
ADDRESSES: st.SearchStrategy[IPAddress] = st.one_of(
    st.integers(0x0A050000 - 2, 0x0A050000 + 0xFFF).map(IPv4Address),
    st.integers(0, 31).map(lambda high: IPv6Address((0xFD05 << 112) | high << 62)),
)


@settings(max_examples=200, deadline=None)
@given(PEERS, st.lists(ADDRESSES, min_size=1, max_size=20))
def test_every_address_leads_to_the_longest_prefix(peers: list[Peer], addresses: list[IPAddress]) -> None:
    table = reference.unpack(pack(HERE, peers))
    for address in addresses:
        index = table.owner(address)
        found = None if index is None else table.peers[index][0]
        assert found == owner(peers, address), address


def test_what_is_packed_is_read_back(core: Core) -> None:
    peers = [
        Peer(IPv4Address("192.0.2.9"), (ip_network("10.5.9.0/24"),), 9999),
        Peer(IPv4Address("192.0.2.2"), (ip_network("10.5.2.0/24"), ip_network("fd05:0:0:2::/64")), ipv6=True),
    ]
    packed = pack(Here(OWN, TUN, NETWORKS, 1400, SourceCheck.STRICT), peers)
    table = reference.unpack(packed)
    assert table.peers == [(IPv4Address("192.0.2.2"), 8285, 1), (IPv4Address("192.0.2.9"), 9999, 0)]
    assert table.own == {4: (ip_address("10.5.7.0"), ip_address("10.5.7.255")), 6: _ends("fd05:0:0:7::/64")}
    assert table.addresses == {4: TUN.v4, 6: TUN.v6}
    assert table.networks == [(ip_address("10.5.0.0"), ip_address("10.5.255.255")), _ends("fd05::/48")]
    assert (table.mtu, table.source_check) == (1400, reference.STRICT)
    assert core.open_table(packed) == ""
    assert core.find_peer(bytes([192, 0, 2, 9])) == (1, bytes([192, 0, 2, 9]), (9999).to_bytes(2, "big"), 0)
    assert core.find_peer(bytes([192, 0, 2, 2])) == (0, bytes([192, 0, 2, 2]), (8285).to_bytes(2, "big"), 1)
    assert core.find_peer(bytes([192, 0, 2, 3])) is None


def _ends(network: str) -> tuple[IPAddress, IPAddress]:
    net = ip_network(network)
    return net.network_address, net.broadcast_address


def test_one_family_alone() -> None:
    table = reference.unpack(pack(Here(PerFamily(OWN.v4), PerFamily(TUN.v4), NETWORKS[:1], 1472), []))
    assert set(table.own) == set(table.addresses) == {4}


def test_peers_behind_one_address_are_one() -> None:
    one = Peer(IPv4Address("192.0.2.2"), (ip_network("10.5.2.0/24"),), 1000, ipv6=True)
    other = Peer(IPv4Address("192.0.2.2"), (ip_network("10.5.3.0/24"),), 2000)
    table = reference.unpack(pack(HERE, [one, other]))
    assert table.peers == [(one.address, 1000, 1)]
    assert [table.owner(ip_address(text)) for text in ("10.5.2.9", "10.5.3.9")] == [0, 0]


def test_no_peer_gets_what_is_ours() -> None:
    around = Peer(IPv4Address("192.0.2.2"), (ip_network("10.5.0.0/16"), ip_network("10.5.7.128/25")))
    table = reference.unpack(pack(HERE, [around]))
    found = [table.owner(ip_address(f"10.5.{low}")) for low in ("6.255", "7.0", "7.200", "7.255", "8.0")]
    assert found == [0, None, None, None, 0]


@pytest.mark.parametrize(
    ("here", "peers", "message"),
    [
        (Here(OWN, TUN, NETWORKS, 67), [], "MTU 67"),
        (Here(OWN, TUN, NETWORKS, 65508), [], "MTU 65508"),
        (Here(OWN, PerFamily(TUN.v4), NETWORKS, 1472), [], "families"),
        (HERE, [Peer(IPv4Address(0), ())], "expected an address"),
        (HERE, [Peer(IPv4Address("192.0.2.2"), (), 65536)], "65536"),
        (Here(OWN, TUN, tuple(ip_network(f"10.{n}.0.0/16") for n in range(1, 40, 2)), 1472), [], "networks"),
    ],
)
def test_what_no_table_can_hold_is_refused(here: Here, peers: list[Peer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(here, peers)


@settings(max_examples=200, deadline=None)
@given(PEERS, st.data())
def test_c_takes_the_tables_the_reference_takes_and_no_other(
    core: Core, peers: list[Peer], data: st.DataObject
) -> None:
    packed = bytearray(pack(HERE, peers))
    for _ in range(data.draw(st.integers(0, 3))):
        match data.draw(st.sampled_from(["byte", "cut", "more"])):
            case "byte":
                at = data.draw(st.one_of(st.integers(0, 43), st.integers(0, len(packed) - 1)))
                if at < len(packed):
                    packed[at] = data.draw(
                        st.sampled_from([0, 1, 2, 255, packed[at] ^ 1, (packed[at] + 1) % 256])
                    )
            case "cut" if packed:
                del packed[data.draw(st.integers(0, len(packed) - 1)) :]
            case _:
                packed += data.draw(st.binary(max_size=40))
        if not packed:
            break
        if data.draw(st.booleans()):
            packed[4:8] = len(packed).to_bytes(4, "little")
    try:
        reference.unpack(bytes(packed))
    except ValueError:
        assert core.open_table(bytes(packed)) != ""
    else:
        assert core.open_table(bytes(packed)) == ""


def test_a_wrong_table_leaves_the_old_one(core: Core) -> None:
    peer = Peer(IPv4Address("192.0.2.2"), (ip_network("10.5.2.0/24"),))
    assert core.open_table(pack(HERE, [peer])) == ""
    assert core.open_table(b"FPT1") == "shorter than its header"
    assert core.find_peer(peer.address.packed) is not None


def test_looking_up_ten_thousand(core: Core) -> None:
    """With a cursor that points anywhere, also beyond the end of a smaller table that came later."""
    for count in (10_000, 10):
        peers = [
            Peer(IPv4Address(0xC6120001 + n), (IPv4Network((0x0A800000 + n * 512, 24)),))
            for n in range(count)
        ]
        assert core.open_table(pack(HERE, peers)) == ""
        for n in (count - 1, 0, *random.Random(1).choices(range(count), k=200)):
            inside, between = 0x0A800000 + n * 512 + 255, 0x0A800000 + n * 512 + 256
            assert core.route(packet_to(inside)) == (None, n)
            assert core.route(packet_to(between)) == ("no-route", None)


def packet_to(destination: int) -> bytes:
    return bytes.fromhex("4500001400000000400600000a050702") + destination.to_bytes(4, "big")
