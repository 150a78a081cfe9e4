"""Scapy, which shares nothing with us, agrees on checksums, segmentation, fragments and ICMP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, UDPerror, defragment, fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPerror6, IPv6
from scapy.packet import Raw

from flanneld_py.udp import referenceicmp
from flanneld_py.udp.reference import GSO_TCPV4, GSO_TCPV6, GSO_UDP, NEEDS_CSUM, Vnet
from tests.unit import packets
from tests.unit.packetcore import Core

DATA = bytes(range(256)) * 30
HEADERS = {
    4: IP(src="10.5.7.9", dst="10.5.2.9", ttl=64, flags="DF", id=0xFFFE, tos=2),
    6: IPv6(src="fd05:0:0:7::9", dst="fd05:0:0:2::9", hlim=64, tc=2, fl=0xABCDE),
}
OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
CHECKSUMS = ("chksum", "cksum")


@pytest.fixture(scope="module")
def core() -> Iterator[Core]:
    core = Core()
    assert core.open_table(packets.table()) == ""
    yield core
    core.close()


def recomputed(packet: bytes) -> bytes:
    """As scapy writes it when it is to work out all checksums and lengths itself."""
    parsed = _parse(packet)
    layer = parsed
    while layer and not isinstance(layer, (IPerror, IPerror6)):  # what ICMP quotes stays as it is
        for name in (*CHECKSUMS, "len", "plen"):
            if name in layer.fields:
                delattr(layer, name)
        layer = layer.payload
    return bytes(parsed)


def _parse(packet: bytes) -> Any:
    return IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1, 536, 1400, 1448, 7680, 9000])
@pytest.mark.parametrize("flags", ["A", "PA", "FPA", "CPA"])
def test_tcp_is_cut_as_scapy_would_write_it(core: Core, version: int, size: int, flags: str) -> None:
    data = DATA[: size * 40]
    whole = HEADERS[version] / TCP(
        sport=1, dport=2, seq=0xFFFFFF00, ack=7, flags=flags, window=99, options=OPTIONS
    )
    kind, start = {4: (GSO_TCPV4, 20), 6: (GSO_TCPV6, 40)}[version]
    _, cut = core.send(bytes(whole / Raw(data)), Vnet(NEEDS_CSUM, kind, 0, size, start, 16))
    assert len(cut) == -(-len(data) // size)
    for number, segment in enumerate(cut):
        wanted = whole.copy()
        last = number == len(cut) - 1
        kept = "".join(flag for flag in flags if flag == "A" or (last if flag in "FP" else number == 0))
        wanted[TCP].flags, wanted[TCP].seq = kept, (0xFFFFFF00 + number * size) % 2**32
        if version == 4:
            wanted.id, wanted.ttl = (0xFFFE + number) % 65536, 63
        else:
            wanted.hlim = 63
        assert segment == bytes(wanted / Raw(data[number * size :][:size]))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1, 100, 1452, 7680])
def test_udp_is_cut_as_scapy_would_write_it(core: Core, version: int, size: int) -> None:
    data = DATA[: size * 40]
    start = {4: 20, 6: 40}[version]
    whole = bytes(HEADERS[version] / UDP(sport=1, dport=2) / Raw(data))
    _, cut = core.send(whole, Vnet(NEEDS_CSUM, GSO_UDP, 0, size, start, 6))
    assert b"".join(bytes(_parse(one)[UDP].payload) for one in cut) == data
    assert [one for one in cut if recomputed(one) != one] == []


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("transport", [TCP, UDP])
def test_a_joined_packet_is_what_scapy_reads_in_it(core: Core, version: int, transport: Any) -> None:
    batch = []
    for number in range(12):
        layer = (
            TCP(sport=1, dport=2, seq=number * 600, flags="A") if transport is TCP else UDP(sport=1, dport=2)
        )
        batch.append(bytes(HEADERS[version] / layer / Raw(DATA[number * 600 :][:600])))
    (entry,) = core.join(batch)
    joined = _parse(entry.packet)
    assert bytes(joined[transport].payload) == DATA[: 12 * 600]
    right = _parse(recomputed(entry.packet))
    names = ("len", "chksum") if version == 4 else ("plen",)
    assert [getattr(joined, name) for name in names] == [getattr(right, name) for name in names]
    assert joined.payload.getfieldval("chksum") == _pseudo_sum(entry.packet, 20 if version == 4 else 40)


@pytest.mark.parametrize("mtu", [68, 576, 1400])
def test_fragments_are_scapys(core: Core, mtu: int) -> None:
    packet = IP(src="10.5.7.9", dst="10.5.2.9", id=77, ttl=9) / UDP(sport=1, dport=2) / Raw(DATA)
    made = core.fragments(bytes(packet), mtu)
    assert made == [bytes(one) for one in fragment(packet, fragsize=(mtu - 20) // 8 * 8)]
    (whole,) = defragment([IP(one) for one in made])
    assert bytes(whole[UDP]) == bytes(packet[UDP])


def test_icmp_as_scapy_reads_it(core: Core) -> None:
    offender = bytes(
        IP(src="10.5.7.9", dst="10.5.2.9", flags="DF") / UDP(sport=1, dport=2) / Raw(DATA[:1000])
    )
    kinds = {"no-route": (3, 0, 0), "ttl-exceeded": (11, 0, 0), "too-big": (3, 4, 1400)}
    for reason, (type_, code, mtu) in kinds.items():
        answer = core.icmp(referenceicmp.KINDS[reason], 1400, offender)
        assert recomputed(answer) == answer
        parsed = IP(answer)
        assert (parsed.src, parsed.dst, parsed.proto) == ("10.5.7.0", "10.5.7.9", 1)
        assert (parsed[ICMP].type, parsed[ICMP].code, parsed[ICMP].nexthopmtu or 0) == (type_, code, mtu)
        assert (parsed[IPerror].dst, parsed[UDPerror].dport) == ("10.5.2.9", 2)
        assert answer[28:] == offender[:548]


def test_icmpv6_as_scapy_reads_it(core: Core) -> None:
    offender = bytes(
        IPv6(src="fd05:0:0:7::9", dst="fd05:0:0:2::9") / UDP(sport=1, dport=2) / Raw(DATA[:2000])
    )
    layers = {
        "no-route": (ICMPv6DestUnreach, 0),
        "ttl-exceeded": (ICMPv6TimeExceeded, 0),
        "too-big": (ICMPv6PacketTooBig, 1400),
    }
    for reason, (layer, mtu) in layers.items():
        answer = core.icmp(referenceicmp.KINDS[reason], 1400, offender)
        assert recomputed(answer) == answer
        parsed = IPv6(answer)
        assert (parsed.src, parsed.dst) == ("fd05:0:0:7::", "fd05:0:0:7::9")
        assert parsed[layer].code == 0
        assert getattr(parsed[layer], "mtu", 0) == mtu
        assert answer[48:] == offender[:1232]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("transport", [TCP, UDP])
@pytest.mark.parametrize("size", [0, 1, 2, 333, 1400])
def test_the_checksum_the_kernel_leaves_to_us(core: Core, version: int, transport: Any, size: int) -> None:
    right = bytes(HEADERS[version] / transport(sport=1, dport=2) / Raw(DATA[:size]))
    start = {4: 20, 6: 40}[version]
    at = start + (16 if transport is TCP else 6)
    _, (whole,) = core.send(right, Vnet())
    assert recomputed(whole) == whole  # with a TTL of one less
    pseudo = _pseudo_sum(right, start)
    partial = right[:at] + pseudo.to_bytes(2, "big") + right[at + 2 :]
    assert core.send(partial, Vnet(NEEDS_CSUM, 0, 0, 0, start, at - start)) == (None, [whole])


def _pseudo_sum(packet: bytes, start: int) -> int:
    """As the kernel leaves it in the checksum's place: addresses, protocol and length."""
    addresses = packet[12:20] if start == 20 else packet[8:40]
    words = [int.from_bytes(addresses[i : i + 2], "big") for i in range(0, len(addresses), 2)]
    total = sum(words) + packet[9 if start == 20 else 6] + len(packet) - start
    return total % 65535 or 65535
