"""The edges of every limit of the C core, one by one: random packets do not often fall on them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address, ip_network

import pytest

from flanneld_py.udp import pypacket, reference, referenceicmp
from flanneld_py.udp.reference import GSO_TCPV4, GSO_TCPV6, GSO_UDP, NEEDS_CSUM, TCP, UDP, Vnet
from flanneld_py.udp.table import Here, Peer, SourceCheck, pack
from tests.unit import packets
from tests.unit.packetcore import Core

A, B, OURS = packets.ADDRESSES4[0], packets.ADDRESSES4[2], packets.ADDRESSES4[3]
A6, OURS6 = packets.ADDRESSES6[0], packets.ADDRESSES6[3]


@pytest.fixture(scope="module")
def core() -> Iterator[Core]:
    core = Core()
    yield core
    core.close()


@pytest.fixture(autouse=True)
def _own_table(core: Core) -> None:
    assert core.open_table(packets.table()) == ""


def datagram(source: str, destination: str) -> bytes:
    one, two = ip_address(source), ip_address(destination)
    make = packets.ipv4 if one.version == 4 else packets.ipv6
    return make(one.packed, two.packed, UDP, packets.udp(b"x"))


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [
        ("10.5.2.9", "10.5.7.0", None),
        ("10.5.2.9", "10.5.7.255", None),
        ("10.5.2.9", "10.5.6.255", "inner-destination"),
        ("10.5.2.9", "10.5.8.0", "inner-destination"),
        ("fd05:0:0:2::9", "fd05:0:0:7::", None),
        ("fd05:0:0:2::9", "fd05:0:0:7:ffff:ffff:ffff:ffff", None),
        ("fd05:0:0:2::9", "fd05:0:0:6:ffff:ffff:ffff:ffff", "inner-destination"),
        ("fd05:0:0:2::9", "fd05:0:0:8::", "inner-destination"),
        ("10.5.2.0", "10.5.7.9", None),
        ("10.5.2.255", "10.5.7.9", None),
        ("10.5.1.255", "10.5.7.9", "inner-source"),
        ("10.5.3.0", "10.5.7.9", "inner-source"),
        ("10.5.7.9", "10.5.7.9", "inner-source"),
        ("10.4.255.255", "10.5.7.9", None),
        ("10.5.0.0", "10.5.7.9", "inner-source"),
        ("10.5.255.255", "10.5.7.9", "inner-source"),
        ("10.6.0.0", "10.5.7.9", None),
        ("fd04:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "fd05:0:0:7::9", None),
        ("fd05::", "fd05:0:0:7::9", "inner-source"),
        ("fd05:0:0:ffff:ffff:ffff:ffff:ffff", "fd05:0:0:7::9", "inner-source"),
        ("fd05:0:1::", "fd05:0:0:7::9", None),
    ],
)
def test_subnets_and_networks_end_where_they_end(
    core: Core, source: str, destination: str, reason: str | None
) -> None:
    assert core.accept(0, datagram(source, destination)) == reason


@pytest.mark.parametrize("check", SourceCheck)
def test_source_check(core: Core, check: SourceCheck) -> None:
    assert core.open_table(packets.table(check)) == ""
    theirs, others, outside = ("10.5.2.9", "10.5.3.9", "198.51.100.1")
    answers = [core.accept(0, datagram(source, "10.5.7.9")) for source in (theirs, others, outside)]
    wrong = "inner-source"
    assert (
        answers
        == {
            SourceCheck.FALSE: [None, None, None],
            SourceCheck.TRUE: [None, wrong, None],
            SourceCheck.STRICT: [None, wrong, wrong],
        }[check]
    )
    assert core.accept(None, datagram(outside, "10.5.7.9")) == "outer-source-unknown"


def test_checks_come_in_their_order(core: Core) -> None:
    """Each packet has what comes later wrong, too; it is counted for what comes first."""
    packet = packets.ipv4(B, A, UDP, packets.udp(b"x"), ttl=0)
    bad = reference.put16(packet, 10, 0)
    broken = [bad[:19], b"\x75" + bad[1:], b"\x44" + bad[1:], bad + b"x", bad, packet]
    reasons = ["too-short", "version", "header-length", "total-length", "header-checksum", "ttl-zero"]
    assert [core.accept(None, one) for one in broken] == reasons
    alive = packets.ipv4(B, A, UDP, packets.udp(b"x"))
    assert [core.accept(sender, alive) for sender in (None, 0)] == [
        "outer-source-unknown",
        "inner-destination",
    ]
    inner6 = ip_address("fd05:0:0:3::9").packed
    assert core.accept(1, packets.ipv6(inner6, OURS6, 59, b"")) == "ipv6-not-agreed"
    assert core.accept(1, packets.ipv6(A6, OURS6, 59, b"")) == "inner-source"


def test_routing_comes_before_ttl(core: Core) -> None:
    for ttl, reason in ((0, "ttl-exceeded"), (1, "ttl-exceeded"), (2, None)):
        assert core.route(packets.ipv4(OURS, A, UDP, packets.udp(b"x"), ttl=ttl)) == (reason, 0)
        assert core.route(packets.ipv6(OURS6, A6, UDP, packets.udp(b"x"), ttl=ttl)) == (reason, 0)
    nobody = ip_address("10.5.4.9").packed
    assert core.route(packets.ipv4(OURS, nobody, UDP, packets.udp(b"x"), ttl=1)) == ("no-route", None)
    other6 = ip_address("fd05:0:0:3::9").packed
    assert core.route(packets.ipv6(OURS6, other6, UDP, packets.udp(b"x"), ttl=1)) == ("ipv6-not-agreed", 1)


@pytest.mark.parametrize(
    ("start", "offset", "fits"),
    [
        (20, 6, True),
        (19, 6, False),
        (0, 10, False),
        (20, 9, True),
        (20, 10, False),
        (29, 0, True),
        (30, 0, False),
    ],
)
def test_a_checksum_lies_within_its_packet(core: Core, start: int, offset: int, fits: bool) -> None:
    packet = packets.ipv4(OURS, A, UDP, packets.udp(b"abc"))
    reason, sent = core.send(packet, Vnet(NEEDS_CSUM, 0, 0, 0, start, offset))
    assert (reason, len(sent)) == ((None, 1) if fits else ("offload", 0))


def test_headers_of_segments_end_somewhere(core: Core) -> None:
    """256 bytes hold both headers; a longer chain of extension headers is not cut."""
    for words, fits in ((23, True), (24, False)):
        chain = bytes([TCP, words]) + bytes(8 * words + 6)
        packet = packets.ipv6(OURS6, A6, 60, chain + packets.tcp(bytes(500), options=bytes(4)))
        start = 40 + len(chain)
        assert (start + 24 <= 256) == fits
        reason, _ = core.send(packet, Vnet(NEEDS_CSUM, GSO_TCPV6, 0, 100, start, 16))
        assert reason == (None if fits else "offload")


def test_a_super_packet_has_no_more_segments_than_a_sender_makes(core: Core) -> None:
    """One of a byte each was once cut into 60,000 packets."""
    for make, kind, offset, header, size, most in (
        (packets.tcp, GSO_TCPV4, 16, 40, 1, 2048),
        (packets.tcp, GSO_TCPV4, 16, 40, 31, 2048),
        (packets.udp, GSO_UDP, 6, 28, 1, 128),
        (packets.udp, GSO_UDP, 6, 28, 500, 128),
    ):
        for payload, fits in ((size * most, True), (size * most + 1, False)):
            packet = packets.ipv4(OURS, A, UDP if kind == GSO_UDP else TCP, make(bytes(payload)))
            vnet = Vnet(NEEDS_CSUM, kind, 0, size, 20, offset)
            reason, sent = core.send(packet, vnet)
            assert (reason, len(sent)) == ((None, most) if fits else ("offload", 0))
            assert (reference.segments(packet, vnet) is not None) == fits
            cut = pypacket.super_headers(memoryview(packet), kind, size)
            assert (cut is not None) == fits
            number = pypacket.segments_count(memoryview(packet), (NEEDS_CSUM, kind, 0, size, 20, offset))
            assert number == (most if fits else 1)
            assert header + payload == len(packet)


def test_a_super_packet_is_what_its_vnet_header_says(core: Core) -> None:
    tcp = packets.complete(packets.ipv4(OURS, A, TCP, packets.tcp(bytes(500))), TCP)
    udp = packets.complete(packets.ipv4(OURS, A, UDP, packets.udp(bytes(500))), UDP)
    right = Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 100, 20, 16)
    assert len(core.send(tcp, right)[1]) == 5
    assert len(core.send(tcp, Vnet(0, GSO_TCPV4 | 0x80, 9999, 100))[1]) == 5
    for packet, vnet in [
        (udp, right),
        (tcp, Vnet(NEEDS_CSUM, GSO_UDP, 0, 100, 20, 6)),
        (tcp, Vnet(NEEDS_CSUM, GSO_TCPV6, 0, 100, 20, 16)),
        (udp, Vnet(NEEDS_CSUM, 3, 0, 100, 20, 6)),
        (tcp, Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 0, 20, 16)),
        (tcp, Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 100, 24, 16)),
        (reference.put(tcp, 32, b"\x40"), right),
        (packets.ipv4(OURS, A, TCP, packets.tcp(b"")[:19]), right),
        (packets.ipv4(OURS, A, TCP, packets.tcp(bytes(500)), field=0x2000), right),
    ]:
        assert core.send(packet, vnet) == ("offload", [])


@pytest.mark.parametrize("size", [1447, 1448, 1449])
@pytest.mark.parametrize(("field", "refused"), [(0, "fragments"), (0x4000, "too-big")])
def test_segments_fit_when_each_does(core: Core, size: int, field: int, refused: str) -> None:
    options = bytes.fromhex("0101080a0000000100000002")
    packet = packets.ipv4(OURS, A, TCP, packets.tcp(bytes(9000), options=options), field=field)
    vnet = Vnet(NEEDS_CSUM, GSO_TCPV4, 0, size, 20, 16)
    assert core.fit(packet, vnet, 1500) == ("whole" if size <= 1448 else refused)
    assert core.fit(packet, Vnet(), len(packet)) == "whole"
    assert core.fit(packet, Vnet(), len(packet) - 1) == refused
    one = Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 60000, 20, 16)
    assert core.fit(packet, one, len(packet)) == "whole"
    assert core.fit(packet, one, len(packet) - 1) == refused


def test_fragments_end_at_the_last_offset(core: Core) -> None:
    """Offsets beyond 13 bits would come out as flags; what cannot be put together is not sent."""
    for offset, count in ((0x1FFF - 6, 4), (0x1FFF - 5, 3), (0x1FFF, 1)):
        packet = packets.ipv4(OURS, A, UDP, bytes(64), field=offset)
        made = core.fragments(packet, 36)
        assert len(made) == count
        assert [reference.be16(one, 6) & 0xE000 for one in made] == [0x2000] * (count - (count == 4)) + (
            [0] if count == 4 else []
        )


@pytest.mark.parametrize(
    ("field", "answered"), [(0, True), (1, True), (7, True), (8, False), (0xFFF9, False)]
)
def test_icmpv6_about_first_fragments_only(core: Core, field: int, answered: bool) -> None:
    body = struct.pack(">BBHI", UDP, 0, field, 1) + packets.udp(b"x")
    answer = core.icmp(referenceicmp.KINDS["no-route"], 0, packets.ipv6(OURS6, A6, 44, body))
    assert bool(answer) == answered


@pytest.mark.parametrize(("type_", "answered"), [(1, False), (128, True)])
def test_icmpv6_behind_an_authentication_header(core: Core, type_: int, answered: bool) -> None:
    """Its length counts words of four bytes, that of the others words of eight (RFC 4302 2.2)."""
    body = bytes([58, 4]) + bytes(22) + bytes([type_]) + bytes(40)
    answer = core.icmp(referenceicmp.KINDS["no-route"], 0, packets.ipv6(OURS6, A6, 51, body))
    assert bool(answer) == answered


@pytest.mark.parametrize(
    ("options", "later"),
    [
        ("94040000", "94040000"),
        ("44040500", "01010101"),
        ("01440305", "01010101"),
        ("00440305", "00440305"),
        ("44060500", "44060500"),
        ("44010500", "44010500"),
        ("01010144", "01010144"),
        ("4404050094040000", "0101010194040000"),
    ],
)
def test_options_of_later_fragments(core: Core, options: str, later: str) -> None:
    """Those to be copied stay, the others become no-operations; from where they make no sense, all stay."""
    packet = packets.ipv4(OURS, A, UDP, bytes(64), options=bytes.fromhex(options))
    first, second, *_ = core.fragments(packet, 68)
    header = 20 + len(options) // 2
    assert (first[20:header].hex(), second[20:header].hex()) == (options, later)


def _tables() -> Iterator[tuple[str, bytes]]:
    """Tables with one thing wrong, just beyond the edge of what is right; and what C says."""
    v4 = [Peer(IPv4Address(f"192.0.2.{n}"), (ip_network(f"10.5.{n}.0/24"),)) for n in (2, 3)]
    v6 = [Peer(IPv4Address(f"192.0.2.{n}"), (ip_network(f"fd05:0:0:{n}::/64"),)) for n in (2, 3)]
    networks = tuple(
        ip_network(text) for text in ("10.5.0.0/24", "10.5.2.0/24", "fd05::/64", "fd05:0:0:2::/64")
    )
    here = Here(packets.OWN, packets.TUN, networks, 1472)
    four, six = pack(here, v4), pack(here, v6)
    ranges = 92 + 2 * 8

    def changed(table: bytes, at: int, new: bytes) -> bytes:
        return table[:at] + new + table[at + len(new) :]

    def little(value: int) -> bytes:
        return value.to_bytes(4, "little")

    yield "", four
    yield "", six
    yield "ranges4: no such peer", changed(four, ranges + 20, little(2))
    yield "ranges6: no such peer", changed(six, ranges + 36 + 32, little(2))
    yield "ranges4: not sorted, or overlapping", changed(four, ranges + 12, little(0x0A0502FF))
    yield "", changed(four, ranges + 12, little(0x0A050300))
    yield "ranges4: not sorted, or overlapping", changed(four, ranges + 16, little(0x0A0502FF))
    yield "ranges6: not sorted, or overlapping", changed(six, ranges + 36, six[ranges + 16 : ranges + 32])
    yield "ranges6: not sorted, or overlapping", changed(six, ranges + 36 + 16, bytes(16))
    nets4, nets6 = ranges + 2 * 12, ranges + 2 * 12 + 16
    yield "networks4: not sorted, or overlapping", changed(four, nets4 + 8, little(0x0A0500FF))
    yield "networks6: not sorted, or overlapping", changed(four, nets6 + 32, four[nets6 + 16 : nets6 + 32])
    yield "peers: not sorted, or not unique", changed(four, 92 + 8, four[92:96])
    yield "peers: address or port is 0", changed(four, 92, bytes(4))
    yield "peers: address or port is 0", changed(four, 96, bytes(2))
    yield "peers: unknown flags", changed(four, 98, b"\2\0")
    yield "own subnet: ends before it begins", changed(four, 36, little(0x0A0506FF))
    yield "own subnet: ends before it begins", changed(four, 60, bytes(16))
    yield "mtu: not 68 to 65507", changed(four, 10, (67).to_bytes(2, "little"))
    yield "", changed(four, 10, (68).to_bytes(2, "little"))
    yield "mtu: not 68 to 65507", changed(four, 10, (65508).to_bytes(2, "little"))
    yield "source check: not 0, 1 or 2", changed(four, 8, b"\3")
    yield "own families: unknown bits", changed(four, 9, b"\4")
    yield "networks: more than 16 of a family", changed(four, 24, little(17))
    yield "counts: do not make up the length", changed(four, 12, little(3))
    yield "counts: do not make up the length", changed(four, 16, little(0xFFFFFFFF))
    yield "length: not that of the table", four + b"\0"
    yield "shorter than its header", four[:91]
    yield "magic: not FPT1", b"FPT2" + four[4:]


def test_what_is_wrong_with_a_table_is_said(core: Core) -> None:
    for number, (message, table) in enumerate(_tables()):
        assert core.open_table(table) == message, number
