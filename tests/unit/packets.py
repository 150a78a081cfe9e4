"""Inner packets for the tests of the udp data plane: right ones, odd ones, and broken ones, by hypothesis."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, ip_address, ip_network

from hypothesis import strategies as st

from flanneld_py.addresses import IPAddress, IPNetwork, PerFamily
from flanneld_py.udp import reference
from flanneld_py.udp.reference import TCP, UDP, Vnet
from flanneld_py.udp.table import Here, Peer, SourceCheck, pack

PEERS = [
    Peer(IPv4Address("192.0.2.2"), (ip_network("10.5.2.0/24"), ip_network("fd05:0:0:2::/64")), ipv6=True),
    Peer(IPv4Address("192.0.2.3"), (ip_network("10.5.3.0/24"), ip_network("fd05:0:0:3::/64"))),
]
OWN: PerFamily[IPNetwork] = PerFamily(ip_network("10.5.7.0/24"), ip_network("fd05:0:0:7::/64"))
TUN: PerFamily[IPAddress] = PerFamily(ip_address("10.5.7.0"), ip_address("fd05:0:0:7::"))
NETWORKS = (ip_network("10.5.0.0/16"), ip_network("fd05::/48"))

ADDRESSES4 = [
    ip_address(text).packed
    for text in (
        *("10.5.2.9", "10.5.2.9", "10.5.3.9", "10.5.7.9", "10.5.7.9", "10.5.4.9", "198.51.100.1", "10.6.0.1"),
        *("0.0.0.1", "127.0.0.1", "224.0.0.1", "239.1.2.3", "255.255.255.255", "240.0.0.1"),
    )
]
ADDRESSES6 = [
    ip_address(text).packed
    for text in (
        *(
            "fd05:0:0:2::9",
            "fd05:0:0:2::9",
            "fd05:0:0:3::9",
            "fd05:0:0:7::9",
            "fd05:0:0:7::9",
            "fd05:0:0:4::9",
        ),
        *("2001:db8::1", "::", "::1", "::2", "ff02::1", "fe80::1"),
    )
]
EDGES4 = [
    ip_address(text).packed
    for text in (
        *("10.5.7.0", "10.5.7.255", "10.5.6.255", "10.5.8.0", "10.5.2.0", "10.5.2.255", "10.5.1.255"),
        *("10.5.3.0", "10.5.3.255", "10.5.0.0", "10.5.255.255", "10.4.255.255", "10.6.0.0"),
    )
]
"""Where the subnets and Networks of `table` begin and end, and what lies beside."""
EDGES6 = [
    ip_address(text).packed
    for text in (
        *("fd05:0:0:7::", "fd05:0:0:7:ffff:ffff:ffff:ffff", "fd05:0:0:6:ffff:ffff:ffff:ffff"),
        *("fd05:0:0:8::", "fd05:0:0:2::", "fd05:0:0:2:ffff:ffff:ffff:ffff", "fd05::"),
        *("fd05:0:0:ffff:ffff:ffff:ffff:ffff", "fd04:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "fd05:0:1::"),
    )
]
EXTENSIONS = [0, 43, 44, 51, 60, 135]


def table(check: SourceCheck = SourceCheck.TRUE) -> bytes:
    return pack(Here(OWN, TUN, NETWORKS, 1472, check), PEERS)


def ipv4(
    source: bytes, destination: bytes, protocol: int, body: bytes, *, options: bytes = b"", **fields: int
) -> bytes:
    """`fields`: tos, id, field, ttl. The header's checksum is right."""
    length = 20 + len(options)
    header = struct.pack(
        ">BBHHHBBH",
        0x40 | length // 4,
        fields.get("tos", 0),
        length + len(body),
        fields.get("id", 0),
        fields.get("field", 0),
        fields.get("ttl", 64),
        protocol,
        0,
    )
    header += source + destination + options
    return reference.put16(header, 10, reference.checksum(header)) + body


def ipv6(
    source: bytes, destination: bytes, protocol: int, body: bytes, *, flow: int = 0, ttl: int = 64
) -> bytes:
    return struct.pack(">IHBB", 6 << 28 | flow, len(body), protocol, ttl) + source + destination + body


def tcp(payload: bytes, *, options: bytes = b"", **fields: int) -> bytes:
    """`fields`: source, destination, sequence, ack, reserved, flags, window, urgent."""
    return (
        struct.pack(
            ">HHIIBBHHH",
            fields.get("source", 1000),
            fields.get("destination", 2000),
            fields.get("sequence", 0),
            fields.get("ack", 0),
            (20 + len(options)) // 4 << 4 | fields.get("reserved", 0),
            fields.get("flags", reference.ACK),
            fields.get("window", 500),
            0,
            fields.get("urgent", 0),
        )
        + options
        + payload
    )


def udp(payload: bytes, *, source: int = 1000, destination: int = 2000) -> bytes:
    return struct.pack(">HHHH", source, destination, 8 + len(payload), 0) + payload


def transport_of(packet: bytes) -> int:
    """Where it begins in a packet made by these functions without extension headers."""
    return (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40


def complete(packet: bytes, protocol: int) -> bytes:
    return reference.complete(packet, transport_of(packet), protocol)


def without_sum(packet: bytes) -> bytes:
    """A UDP datagram, its last two bytes such that the checksum works out at 0."""
    checksum = complete(packet[:-2] + b"\0\0", UDP)[transport_of(packet) + 6 :][:2]
    return complete(packet[:-2] + checksum, UDP)


def _pairs(usual: list[bytes], edges: list[bytes]) -> st.SearchStrategy[tuple[bytes, bytes]]:
    """Source and destination: received from a peer, sent to one, or any."""
    peers, ours, either = usual[:3], usual[3:4], st.one_of(st.sampled_from(usual), st.sampled_from(edges))
    return st.one_of(
        st.tuples(st.sampled_from(peers), st.sampled_from(ours)),
        st.tuples(st.sampled_from(ours), st.sampled_from(peers)),
        st.tuples(either, either),
    )


PAIRS4, PAIRS6 = _pairs(ADDRESSES4, EDGES4), _pairs(ADDRESSES6, EDGES6)
OCTET, WORD, LONG = st.integers(0, 255), st.integers(0, 65535), st.integers(0, 2**32 - 1)
TTLS = st.sampled_from([64, 64, 255, 2, 1, 0])
PAYLOADS = st.one_of(
    st.binary(max_size=40), st.integers(0, 3000).map(lambda n: bytes(range(256)) * 12 + b"\xff" * n)
)
WORDS_OF_OPTIONS = st.binary(max_size=40).map(lambda data: data[: len(data) // 4 * 4])
OPTIONS4 = st.one_of(
    st.just(b""),
    st.just(b""),
    st.just(
        bytes.fromhex("940400000101070704000000000044080508")[:16]
    ),  # router alert, record route, timestamp
    WORDS_OF_OPTIONS,
)
FIELDS4 = st.one_of(st.sampled_from([0, 0x4000, 0x4000, 0x2000, 0x0010, 0x2010, 0x8000, 0x1FFF]), WORD)


@st.composite
def tcp_segments(draw: st.DrawFn) -> bytes:
    fields = {
        "source": draw(st.sampled_from([1000, 1001])),
        "sequence": draw(LONG),
        "ack": draw(LONG),
        "reserved": draw(st.sampled_from([0, 0, 1, 15])),
        "flags": draw(st.one_of(st.sampled_from([0x10, 0x18, 0x19, 0x90, 0x02]), OCTET)),
        "window": draw(WORD),
        "urgent": draw(st.sampled_from([0, 1])),
    }
    return tcp(draw(PAYLOADS), options=draw(WORDS_OF_OPTIONS), **fields)


BODIES = st.one_of(
    st.tuples(st.just(TCP), tcp_segments()),
    st.tuples(st.just(UDP), PAYLOADS.map(udp)),
    st.tuples(
        st.sampled_from([1, 58]), st.tuples(st.integers(0, 140), PAYLOADS).map(lambda p: bytes([p[0]]) + p[1])
    ),
    st.tuples(st.sampled_from([*EXTENSIONS, 1, 4, 6, 17, 41, 50, 58, 132]), st.binary(max_size=60)),
)


@st.composite
def packets4(draw: st.DrawFn) -> bytes:
    protocol, body = draw(BODIES)
    fields = {"tos": draw(OCTET), "id": draw(WORD), "field": draw(FIELDS4), "ttl": draw(TTLS)}
    source, destination = draw(PAIRS4)
    packet = ipv4(source, destination, protocol, body, options=draw(OPTIONS4), **fields)
    return complete(packet, protocol) if _has_checksum(protocol, body) else packet


@st.composite
def packets6(draw: st.DrawFn) -> bytes:
    protocol, body = draw(BODIES)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        kind = draw(st.sampled_from(EXTENSIONS))
        filling = draw(st.binary(min_size=14, max_size=14))
        body = bytes([protocol, 1]) + (b"\0\0" + filling[2:] if draw(st.booleans()) else filling) + body
        protocol = kind
    source, destination = draw(PAIRS6)
    packet = ipv6(source, destination, protocol, body, flow=draw(st.integers(0, 2**28 - 1)), ttl=draw(TTLS))
    return complete(packet, protocol) if _has_checksum(protocol, body) else packet


def _has_checksum(protocol: int, body: bytes) -> bool:
    return len(body) >= {TCP: 20, UDP: 8}.get(protocol, 1 << 16)


PACKETS = st.one_of(packets4(), packets6())


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A packet, more often than not with something wrong."""
    packet = bytearray(draw(st.one_of(PACKETS, st.binary(max_size=80))))
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.sampled_from(["byte", "header", "cut", "more", "checksum"])):
            case "byte" if packet:
                packet[draw(st.integers(0, len(packet) - 1))] = draw(OCTET)
            case "header" if len(packet) >= 40:
                packet[draw(st.integers(0, 39))] = draw(st.one_of(st.sampled_from([0, 1, 255]), OCTET))
            case "cut":
                del packet[draw(st.integers(0, len(packet))) :]
            case "more":
                packet += draw(st.binary(max_size=20))
            case "checksum" if len(packet) >= 20:  # so that later checks are reached
                packet[10:12] = b"\0\0"
                header = bytes(packet[: (packet[0] & 15) * 4])
                packet[10:12] = reference.checksum(header).to_bytes(2, "big")
    return bytes(packet)


@st.composite
def vnets(draw: st.DrawFn, packet: bytes) -> Vnet:
    """A header the kernel could have put before this packet, or one that does not fit it."""
    start = transport_of(packet) if packet else 0
    protocol = packet[6 if packet[0] >> 4 == 6 else 9] if len(packet) >= 20 else 0
    kinds = {(4, TCP): reference.GSO_TCPV4, (6, TCP): reference.GSO_TCPV6}
    kind = kinds.get((packet[0] >> 4 if packet else 0, protocol), reference.GSO_UDP)
    offset = 6 if protocol == UDP else 16
    size = draw(st.sampled_from([1, 7, 100, 536, 1400, 1448, 60000]))
    right = st.one_of(
        st.just(Vnet()),
        st.just(Vnet(reference.NEEDS_CSUM, 0, 0, 0, start, offset)),
        st.builds(
            Vnet,
            st.just(1),
            st.sampled_from([kind, kind | 0x80]),
            WORD,
            st.just(size),
            st.just(start),
            st.just(offset),
        ),
    )
    small = st.integers(0, 100)
    odd = st.builds(
        Vnet,
        st.integers(0, 3),
        st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x80, 9]),
        WORD,
        st.one_of(st.integers(0, 3), WORD),
        st.one_of(small, WORD),
        st.one_of(small, WORD),
    )
    return draw(st.one_of(right, right, right, odd))
