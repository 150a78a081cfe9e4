"""Joining received packets: only what cutting gives back, each flow in order, as the plain twin does it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flanneld_py.udp import reference, referencejoin
from flanneld_py.udp.reference import TCP, UDP, Vnet
from tests.unit import packetcore, packets
from tests.unit.packetcore import Core, Joined

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
A, OURS = packets.ADDRESSES4[0], packets.ADDRESSES4[3]
A6, OURS6 = packets.ADDRESSES6[0], packets.ADDRESSES6[3]
STAMPS = bytes.fromhex("0101080a0000000100000002")
ODDITIES = [
    "short",
    "long",
    "empty",
    "push",
    "fin",
    "syn",
    "ack",
    "window",
    "urgent",
    "options",
    "reserved",
    "gap",
    "tos",
    "ttl",
    "df",
    "evil",
    "id",
    "ip-options",
    "fragment",
    "bad-checksum",
    "no-checksum",
    "udp-length",
    "extension",
]


@pytest.fixture(scope="module")
def core() -> Iterator[Core]:
    core = Core()
    yield core
    core.close()


@dataclass
class Flow:
    """A sender that numbers its packets."""

    version: int
    protocol: int
    port: int
    df: bool = True
    sequence: int = 0xFFFFF000
    id: int = 0xFFFC
    source: bytes = b""

    def next(self, size: int = 100, odd: str = "", value: int = 1) -> bytes:
        size = {"short": size // 2, "long": size + 9, "empty": 0}.get(odd, size)
        payload = bytes((self.sequence + i) % 251 for i in range(size))
        body = self._segment(payload, odd, value) if self.protocol == TCP else self._datagram(payload)
        self.sequence = (self.sequence + size) % 2**32
        protocol = self.protocol
        if self.version == 6:
            if odd == "extension":
                return packets.ipv6(self.source or A6, OURS6, 60, bytes([protocol, 0]) + bytes(6) + body)
            ttl = 63 if odd == "ttl" else 64
            packet = packets.ipv6(
                self.source or A6, OURS6, protocol, body, flow=value << 20 if odd == "tos" else 0, ttl=ttl
            )
        else:
            packet = self._ipv4(body, odd, value)
        packet = packets.complete(packet, protocol)
        return _broken(packet, odd, protocol)

    def _ipv4(self, body: bytes, odd: str, value: int) -> bytes:
        flags = 0x4000 if self.df != (odd == "df") else 0
        flags |= {"evil": 0x8000, "fragment": 0x2000}.get(odd, 0)
        fields = {"tos": value if odd == "tos" else 0, "ttl": 63 if odd == "ttl" else 64}
        self.id = (self.id + (value if odd == "id" else 1)) % 65536
        options = bytes(4) if odd == "ip-options" else b""
        return packets.ipv4(
            self.source or A, OURS, self.protocol, body, options=options, field=flags, id=self.id, **fields
        )

    def _segment(self, payload: bytes, odd: str, value: int) -> bytes:
        flags = reference.ACK | {"push": 8, "fin": 1, "syn": 2}.get(odd, 0)
        sequence = (self.sequence + (value if odd == "gap" else 0)) % 2**32
        fields = {name: value for name in ("ack", "window", "urgent", "reserved") if name == odd}
        options = STAMPS[:8] + bytes([value % 256]) * 4 if odd == "options" else STAMPS
        return packets.tcp(
            payload, options=options, source=self.port, sequence=sequence, flags=flags, **fields
        )

    def _datagram(self, payload: bytes) -> bytes:
        return packets.udp(payload, source=self.port)


def _broken(packet: bytes, odd: str, protocol: int) -> bytes:
    at = packets.transport_of(packet)
    if odd == "bad-checksum":
        return packet[:-1] + bytes([packet[-1] ^ 0x55])
    if odd == "no-checksum" and protocol == UDP:
        return reference.put16(packet, at + 6, 0)
    if odd == "udp-length" and protocol == UDP:
        return reference.put16(packet, at + 4, len(packet) - at - 1)
    return packet


def flows() -> list[Flow]:
    """None of these share a slot of the joiner's hash table."""
    return [
        *(Flow(4, TCP, 1000), Flow(4, TCP, 1001, df=False), Flow(4, UDP, 1000), Flow(4, UDP, 1003, df=False)),
        *(Flow(6, TCP, 1000), Flow(6, UDP, 1000)),
    ]


@st.composite
def batches(draw: st.DrawFn) -> list[bytes]:
    """Long runs of flows, mixed, with oddities here and there."""
    senders = flows()[: draw(st.integers(1, 6))]
    batch = []
    for _ in range(draw(st.integers(1, 12))):
        sender, size = draw(st.sampled_from(senders)), draw(st.sampled_from([100, 100, 1, 33, 1400]))
        batch += [sender.next(size) for _ in range(draw(st.integers(0, 5)))]
        if draw(st.booleans()):
            batch.append(sender.next(size, draw(st.sampled_from(ODDITIES)), draw(st.integers(1, 3))))
    return batch


def expected(batch: list[bytes], *, tcp: bool = True, udp: bool = True) -> list[Joined]:
    entries = referencejoin.join(batch, tcp=tcp, udp=udp)
    written = [(*referencejoin.written(entry), entry.packets) for entry in entries]
    return [Joined(vnet.pack(), packet, split) for vnet, packet, split in written]


@MANY
@given(batches(), st.sampled_from([0, 1, 2, 3, 3, 3]))
def test_joined_as_the_reference_joins(core: Core, batch: list[bytes], allowed: int) -> None:
    tcp, udp = bool(allowed & packetcore.TCP), bool(allowed & packetcore.UDP)
    assert core.join(batch, allowed) == expected(batch, tcp=tcp, udp=udp)


def flow_of(packet: bytes) -> tuple[int, bytes, bytes]:
    """Protocol, addresses, and where ports would be."""
    at = packets.transport_of(packet)
    four = packet[0] >> 4 == 4
    return packet[9 if four else 6], packet[12:20] if four else packet[8:40], packet[at : at + 4]


def by_flow(batch: Iterable[bytes]) -> dict[tuple[int, bytes, bytes], list[bytes]]:
    flows = defaultdict(list)
    for packet in batch:
        flows[flow_of(packet)].append(packet)
    return flows


@MANY
@given(st.lists(packets.PACKETS, max_size=12))
def test_any_packets_come_out_as_they_went_in(core: Core, batch: list[bytes]) -> None:
    assert by_flow(one for entry in core.join(batch) for one in entry.split) == by_flow(batch)


@pytest.mark.parametrize("flow", range(6))
def test_a_run_of_a_flow_is_one(core: Core, flow: int) -> None:
    """That the others really compare something: plain runs are joined, whatever the family and protocol."""
    sender = flows()[flow]
    batch = [sender.next(1000) for _ in range(20)] + [sender.next(10)]
    (entry,) = core.join(batch)
    assert entry.split == batch
    vnet = Vnet(*_fields(entry.vnet))
    assert vnet.gso_size == 1000
    _, cut = core.send(_one_hop_more(entry.packet), vnet)
    assert [_without_meaning(one) for one in cut] == [_without_meaning(one) for one in batch]


def _fields(vnet: bytes) -> tuple[int, ...]:
    words = [int.from_bytes(vnet[at : at + 2], "little") for at in range(2, 10, 2)]
    return vnet[0], vnet[1], *words


def _one_hop_more(packet: bytes) -> bytes:
    """With its TTL one higher: sending takes it off again."""
    if packet[0] >> 4 == 6:
        return reference.put(packet, 7, bytes([packet[7] + 1]))
    packet = reference.put16(reference.put(packet, 8, bytes([packet[8] + 1])), 10, 0)
    return reference.put16(packet, 10, reference.checksum(packet[:20]))


def _without_meaning(packet: bytes) -> bytes:
    """Of IPv4 with DF, the identification (RFC 6864), and the checksum that covers it."""
    if packet[0] >> 4 == 4 and packet[6] & 0x40:
        return reference.put16(reference.put16(packet, 4, 0), 10, 0)
    return packet


@pytest.mark.parametrize("odd", ODDITIES)
@pytest.mark.parametrize("flow", range(6))
def test_no_oddity_is_lost(core: Core, flow: int, odd: str) -> None:
    """One odd packet in a run: all packets arrive in order, and cutting gives each back as it was."""
    sender = flows()[flow]
    batch = [sender.next(), sender.next(), sender.next(100, odd, 2), sender.next(), sender.next()]
    entries = core.join(batch)
    assert entries == expected(batch)
    assert [one for entry in entries for one in entry.split] == batch
    for entry in entries:
        if len(entry.split) > 1:
            _, cut = core.send(_one_hop_more(entry.packet), Vnet(*_fields(entry.vnet)))
            assert [_without_meaning(one) for one in cut] == [_without_meaning(one) for one in entry.split]


@pytest.mark.parametrize(
    ("flow", "size", "counts"),
    [
        (0, 1, [128, 72]),
        (2, 1, [64, 64, 64, 8]),
        (0, 1448, [45, 45, 45, 45, 20]),
        (5, 1400, [46, 46, 46, 46, 16]),
    ],
)
def test_no_more_than_the_kernel_takes(core: Core, flow: int, size: int, counts: list[int]) -> None:
    sender = flows()[flow]
    entries = core.join([sender.next(size) for _ in range(200)])
    assert [len(entry.split) for entry in entries] == counts
    assert max(len(entry.packet) for entry in entries) <= 65535


@pytest.mark.parametrize(("last", "counts"), [(1235, [53]), (1236, [52, 1])])
def test_a_joined_packet_is_no_longer_than_its_header_can_say(
    core: Core, last: int, counts: list[int]
) -> None:
    """28 bytes of headers, 52 datagrams, and one that makes 65,535 of it or one more."""
    sender = flows()[2]
    entries = core.join([sender.next(1236) for _ in range(52)] + [sender.next(last)])
    assert [len(entry.split) for entry in entries] == counts


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_wrong_checksum_is_never_repaired(core: Core, bad: int) -> None:
    for sender in flows():
        batch = [sender.next(100, "bad-checksum" if n == bad else "") for n in range(4)]
        alone = [entry for entry in core.join(batch) if batch[bad] in entry.split]
        assert [(entry.packet, entry.split) for entry in alone] == [(batch[bad], [batch[bad]])]


@pytest.mark.parametrize("alike", ["addresses", "ports"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_flows_that_share_slots_stay_apart(core: Core, version: int, protocol: int, alike: str) -> None:
    """Many more flows than slots: entries end early, nothing is mixed, nothing overtakes within a flow."""
    dice = random.Random(7)
    sources = [(A[:3] if version == 4 else A6[:15]) + bytes([n]) for n in range(150)]
    senders = [Flow(version, protocol, port=n) for n in range(150)]
    if alike == "ports":
        senders = [Flow(version, protocol, port=9, source=source) for source in sources]
    batch = [sender.next(10) for sender in dice.choices(senders, k=125) for _ in range(2)]
    entries = core.join(batch)
    assert by_flow(one for entry in entries for one in entry.split) == by_flow(batch)
    assert [entry for entry in entries if len(by_flow(entry.split)) > 1] == []
    assert len(entries) < len(batch)


def test_a_full_joiner_says_so(core: Core) -> None:
    """What it has taken until then is whole; the rest is for the next batch."""
    alone = packets.ipv4(A, OURS, 1, b"\x08 ping!!")
    assert len(core.join([alone] * 300)) == 256
    sender = flows()[2]
    batch = [sender.next(20) for _ in range(1024)]
    assert [one for entry in core.join(batch) for one in entry.split] == batch


def test_fragments_are_not_overtaken(core: Core) -> None:
    """A later fragment shows no ports: it ends the entries of all flows."""
    sender = flows()[2]
    first, second = sender.next(), sender.next()
    later = packets.ipv4(A, OURS, UDP, b"later part of a datagram", field=0x0010)
    assert [entry.packet for entry in core.join([first, later, second])] == [first, later, second]


def test_a_datagram_without_checksum_stays_without(core: Core) -> None:
    """Also where its checksum would have worked out at 0, so that the sum over the datagram is right."""
    one = packets.without_sum(packets.ipv4(A, OURS, UDP, packets.udp(bytes(20)), field=0x4000))
    bare = reference.put16(one, 26, 0)
    assert [len(entry.split) for entry in core.join([one, one, one])] == [3]
    assert [entry.packet for entry in core.join([bare, bare, bare])] == [bare] * 3
