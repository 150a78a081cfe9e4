"""The C core of the udp data plane does what its plain twin does, byte for byte, whatever the packet."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flanneld_py.udp import reference, referenceicmp
from flanneld_py.udp.reference import TCP, UDP, Vnet
from flanneld_py.udp.table import SourceCheck
from tests.unit import packets
from tests.unit.packetcore import Core, build

MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
MORE = settings(MANY, max_examples=1000)
"""Where much has to come together: the right header, the right peer, and something wrong."""
SECOND = 1_000_000_000
A, B, OURS = packets.ADDRESSES4[0], packets.ADDRESSES4[2], packets.ADDRESSES4[3]
A6, OURS6 = packets.ADDRESSES6[0], packets.ADDRESSES6[3]
MTUS = st.sampled_from([68, 100, 576, 1280, 1400, 1472, 9000, 65507])


@pytest.fixture(scope="module")
def core() -> Iterator[Core]:
    core = Core()
    assert core.open_table(packets.table()) == ""
    yield core
    core.close()


TABLE = reference.unpack(packets.table())


def test_reasons_have_one_list_of_names(core: Core) -> None:
    assert core.names() == reference.DROPS


def test_other_compilers_make_one_program_of_it() -> None:
    """Sanitizers leave out what a compiler may name in its own way: the checksum for wide vectors."""
    name = b"\1\0\0\0n"
    answers = {
        subprocess.run([build("plain", cc)], input=name, capture_output=True, check=True).stdout
        for cc in ("", "clang")
    }
    assert len(answers) == 1


@MANY
@given(st.binary(max_size=3000), st.integers(0, 31))
def test_checksum_of_any_bytes_anywhere(core: Core, data: bytes, skip: int) -> None:
    assert core.checksum(data, skip) ^ 0xFFFF == reference.checksum(data)


@pytest.mark.parametrize("length", [1, 2, 1448, 65535])
def test_checksum_does_not_overflow(core: Core, length: int) -> None:
    assert core.checksum(b"\xff" * length, 1) == (0xFFFF if length % 2 == 0 else 0xFF00)


@pytest.mark.parametrize("check", SourceCheck)
def test_received(core: Core, check: SourceCheck) -> None:
    packed = packets.table(check)
    assert core.open_table(packed) == ""
    table = reference.unpack(packed)

    @MORE
    @given(packets.mutated(), st.sampled_from([None, 0, 0, 1]))
    def same(packet: bytes, sender: int | None) -> None:
        assert core.accept(sender, packet) == reference.accept(table, sender, packet)

    same()
    assert core.open_table(packets.table()) == ""


@MANY
@given(packets.mutated())
def test_routed(core: Core, packet: bytes) -> None:
    assert core.route(packet) == reference.route(TABLE, packet)


@MORE
@given(packets.PACKETS, st.data())
def test_sent(core: Core, packet: bytes, data: st.DataObject) -> None:
    """TTL, checksums and segmentation; also of packets whose transport header is broken."""
    assume(packet[8 if packet[0] >> 4 == 4 else 7] > 1)
    vnet = data.draw(packets.vnets(packet))
    if data.draw(st.booleans()) and len(packet) > 60:
        at = data.draw(st.integers(transport_of(packet), len(packet) - 1))
        packet = reference.put(packet, at, bytes([data.draw(packets.OCTET)]))
    reason, finished = reference.finish(packet, vnet)
    expected: list[bytes] | None = [finished]
    if reason is None and vnet.gso_type != reference.GSO_NONE:
        expected = reference.segments(finished, vnet)
    if expected is None or reason is not None:
        assert core.send(packet, vnet) == ("offload", [])
    else:
        assert core.send(packet, vnet) == (None, expected)


def transport_of(packet: bytes) -> int:
    return min(packets.transport_of(packet), len(packet) - 1)


@MANY
@given(packets.PACKETS, st.data())
def test_fit(core: Core, packet: bytes, data: st.DataObject) -> None:
    vnet = data.draw(packets.vnets(packet))
    segment = transport_of(packet) + vnet.gso_size
    edges = [length + by for length in (len(packet), segment + 8, segment + 20) for by in (-1, 0, 1)]
    mtu = data.draw(st.one_of(MTUS, st.sampled_from([edge for edge in edges if 68 <= edge < 65508] or [68])))
    assert core.fit(packet, vnet, mtu) == reference.fit(packet, vnet, mtu)


@MANY
@given(packets.packets4(), MTUS)
def test_fragments(core: Core, packet: bytes, mtu: int) -> None:
    made = core.fragments(packet, mtu)
    assert made == reference.fragments(packet, mtu)
    header = (packet[0] & 15) * 4
    for fragment in made:
        assert len(fragment) <= mtu
        assert reference.parse(fragment)[0] is None
        assert reference.checksum(fragment[:header]) == 0
    payload = b"".join(fragment[header:] for fragment in made)
    assert payload == packet[header:][: len(payload)]
    if (reference.be16(packet, 6) & reference.OFFSET) * 8 + len(packet) <= 65535:
        assert payload == packet[header:]


@MORE
@given(packets.PACKETS, st.sampled_from(list(referenceicmp.KINDS)), MTUS)
def test_icmp(core: Core, packet: bytes, reason: str, mtu: int) -> None:
    expected = referenceicmp.error(TABLE, reason, mtu, packet)
    assert core.icmp(referenceicmp.KINDS[reason], mtu, packet) == (expected or b"")


def test_no_icmp_where_none_may_be(core: Core) -> None:
    """Named ones of RFC 1122 3.2.2 and RFC 4443 2.4, beside the random ones."""
    no_route = referenceicmp.KINDS["no-route"]
    hello = packets.ipv4(A, B, UDP, packets.udp(b"hello"))
    assert core.icmp(no_route, 0, hello)[20:22] == bytes([3, 0])
    assert core.icmp(0, 0, hello) == b""
    for type_ in (3, 4, 5, 11, 12):
        assert core.icmp(no_route, 0, packets.ipv4(A, B, 1, bytes([type_]) + bytes(7))) == b""
    assert core.icmp(no_route, 0, packets.ipv4(A, B, 1, bytes([8]) + bytes(7))) != b""
    assert core.icmp(no_route, 0, packets.ipv4(A, B, UDP, b"later part", field=0x0010)) == b""
    for address in packets.ADDRESSES4[8:]:
        assert core.icmp(no_route, 0, packets.ipv4(address, B, UDP, packets.udp(b""))) == b"", address
    for address in packets.ADDRESSES4[10:]:
        assert core.icmp(no_route, 0, packets.ipv4(A, address, UDP, packets.udp(b""))) == b"", address
    for type_, answered in ((1, False), (2, False), (127, False), (128, True), (137, False), (135, True)):
        packet = packets.ipv6(A6, OURS6, 58, bytes([type_]) + bytes(7))
        assert bool(core.icmp(no_route, 0, packet)) == answered, type_
        hidden = packets.ipv6(A6, OURS6, 60, bytes([58, 0]) + bytes(6) + bytes([type_]) + bytes(7))
        assert bool(core.icmp(no_route, 0, hidden)) == answered, type_


def test_icmp_quotes_no_more_than_it_may(core: Core) -> None:
    big = packets.ipv4(A, B, UDP, packets.udp(bytes(4000)))
    assert len(core.icmp(referenceicmp.KINDS["too-big"], 1400, big)) == 576
    big6 = packets.ipv6(A6, OURS6, UDP, packets.udp(bytes(4000)))
    answer = core.icmp(referenceicmp.KINDS["too-big"], 1000, big6)
    assert len(answer) == 1280
    assert reference.be32(answer, 44) == 1280


def test_icmp_is_limited_to_a_hundred_a_second(core: Core) -> None:
    start = 5 * SECOND
    burst = core.budget([start] * 300)
    assert sum(burst) == 100
    assert burst[:100] == [True] * 100
    steady = core.budget([start] * 100 + [start + n * SECOND // 1000 for n in range(2000)])
    assert 198 <= sum(steady[100:]) <= 200
    assert sum(core.budget([start] * 200 + [start - SECOND] * 50 + [start + 100 * SECOND] * 200)) == 200


def test_ttl_is_decremented_for_every_checksum(core: Core) -> None:
    """RFC 1624's update is right where others are off by one: at sums of 0 and 0xffff."""
    for number in range(0, 65536, 17):
        packet = packets.ipv4(A, B, UDP, packets.udp(b"x"), id=number)
        _, (sent,) = core.send(packet, Vnet())
        assert reference.checksum(sent[:20]) == 0
        assert (sent[8], sent[10:12] == b"\xff\xff") == (63, False)


def test_udp_checksum_that_is_zero_is_sent_as_ones(core: Core) -> None:
    """The kernel leaves the checksum to us; 0 would say that there is none (RFC 768)."""
    packet = packets.without_sum(packets.ipv4(A, B, UDP, packets.udp(b"--")))
    assert packet[26:28] == b"\xff\xff"
    pseudo = sum(reference.be16(packet, at) for at in (12, 14, 16, 18)) + UDP + 10
    partial = reference.put16(packet, 26, pseudo % 65535)
    _, (sent,) = core.send(partial, Vnet(reference.NEEDS_CSUM, 0, 0, 0, 20, 6))
    assert sent[26:28] == b"\xff\xff"
    _, cut = core.send(partial, Vnet(reference.NEEDS_CSUM, reference.GSO_UDP, 0, 2, 20, 6))
    assert [one[26:28] for one in cut] == [b"\xff\xff"]


def test_ipv6_is_cut_behind_extension_headers(core: Core) -> None:
    body = bytes([TCP, 0]) + bytes(6) + packets.tcp(bytes(3000), flags=0x99, sequence=0xFFFFFC00)
    packet = packets.ipv6(A6, OURS6, 60, body)
    vnet = Vnet(reference.NEEDS_CSUM, reference.GSO_TCPV6, 0, 1400, 48, 16)
    reason, cut = core.send(packet, vnet)
    assert reason is None
    assert [len(one) for one in cut] == [1468, 1468, 268]
    assert [one[48 + 13] for one in cut] == [0x90, 0x10, 0x19]
    assert [reference.be32(one, 52) for one in cut] == [0xFFFFFC00, 0x178, 0x6F0]
    routed = reference.put(packet, 6, bytes([43]))
    assert core.send(routed, vnet)[0] is None
    assert core.send(reference.put(routed, 43, b"\1"), vnet)[0] == "offload"
