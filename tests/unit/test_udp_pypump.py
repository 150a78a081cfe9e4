"""The pure Python pump decides, cuts and joins byte by byte as the reference, and so as the C core, does."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flanneld_py.udp import pump, pypacket, pypump, reference, referenceicmp, worker
from flanneld_py.udp.pyjoin import Joiner
from flanneld_py.udp.pytable import Table
from flanneld_py.udp.table import SourceCheck
from tests.unit import packets
from tests.unit.test_udp_join import batches, expected

MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
MTUS = st.sampled_from([68, 100, 576, 1280, 1400, 1472, 9000, 65507])
PACKED = packets.table()


def writable(packet: bytes) -> memoryview:
    return memoryview(bytearray(packet))


def test_names_are_those_of_the_extension() -> None:
    assert tuple(reference.DROPS) == pypump.DROP_REASONS
    try:
        from flanneld_py.udp import _pump  # noqa: PLC0415 - it may not be built
    except ImportError as error:
        pytest.skip(f"the extension is not built: {error}")
    assert pypump.DROP_REASONS == _pump.DROP_REASONS
    assert pypump.COUNTERS == _pump.COUNTERS
    assert set(pump.BUSY) <= set(_pump.COUNTERS)


def test_the_worker_needs_no_more_than_the_interpreter() -> None:
    """Packets wait while it starts: json, typing, enum and socket take milliseconds each."""
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    code = (
        f"import sys; sys.path.append({str(pump.WORKER.parents[2])!r}); "
        "from flanneld_py.udp import worker, pypump; print(*sys.modules)"
    )
    argv = [sys.executable, "-I", "-S", "-c", code]
    loaded = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert "flanneld_py.udp.pypump" in loaded
    assert not {"json", "typing", "enum", "re", "socket", "ipaddress", "dataclasses", "pathlib"} & set(loaded)
    assert worker.PLANES == ("auto", "native", "python")


@pytest.mark.parametrize("check", SourceCheck)
def test_received(check: SourceCheck) -> None:
    table, twin = Table(packets.table(check)), reference.unpack(packets.table(check))

    @MANY
    @given(packets.mutated(), st.sampled_from([None, 0, 0, 1]))
    def same(packet: bytes, sender: int | None) -> None:
        assert pypacket.accept(table, sender, writable(packet)) == reference.accept(twin, sender, packet)

    same()


@MANY
@given(packets.mutated())
def test_routed(packet: bytes) -> None:
    reason, peer = pypacket.route(Table(PACKED), writable(packet))
    assert (reason, None if peer < 0 else peer) == reference.route(reference.unpack(PACKED), packet)


@MANY
@given(packets.PACKETS, MTUS, st.data())
def test_sent(packet: bytes, mtu: int, data: st.DataObject) -> None:
    """Whether it fits; TTL, checksums and segmentation."""
    assume(packet[8 if packet[0] >> 4 == 4 else 7] > 1)
    vnet = data.draw(packets.vnets(packet))
    reason, finished = reference.finish(packet, vnet)
    buffer = writable(packet)
    cut = None
    if vnet.gso_type != reference.GSO_NONE:
        cut = pypacket.super_headers(buffer, vnet.gso_type, vnet.gso_size)
        if cut is not None and vnet.flags & pypacket.NEEDS_CSUM and vnet.csum_start != cut[0]:
            cut = None
        if reason is None and reference.segments(finished, vnet) is None:
            assert cut is None
            return
    ours = pypacket.finish(buffer, vnet.flags, vnet.gso_type, vnet.csum_start, vnet.csum_offset)
    assert ours == (reason is None)
    if reason is not None:
        return
    assert bytes(buffer) == finished
    if cut is not None:
        made = pypacket.segments(buffer, vnet.gso_type, vnet.gso_size, *cut)
        assert [bytes(header) + bytes(payload) for header, payload in made] == reference.segments(
            finished, vnet
        )
    if len(packet) > mtu and cut is None and vnet.gso_type == reference.GSO_NONE:
        assert pypacket.may_fragment(buffer) == (reference.fit(packet, vnet, mtu) == "fragments")


@MANY
@given(packets.packets4(), MTUS)
def test_fragments(packet: bytes, mtu: int) -> None:
    made = [bytes(header) + bytes(payload) for header, payload in pypacket.fragments(writable(packet), mtu)]
    assert made == reference.fragments(packet, mtu)


@MANY
@given(packets.PACKETS, st.sampled_from(list(referenceicmp.KINDS)), MTUS)
def test_icmp(packet: bytes, reason: str, mtu: int) -> None:
    answer = pypacket.icmp_error(Table(PACKED), reason, mtu, writable(packet))
    assert answer == referenceicmp.error(reference.unpack(PACKED), reason, mtu, packet)


@MANY
@given(batches(), st.booleans(), st.booleans())
def test_joined(batch: list[bytes], tcp: bool, udp: bool) -> None:
    joiner = Joiner(tcp=tcp, udp=udp)
    for packet in batch:
        joiner.add(writable(packet))
    found = [
        (bytes(pieces[0]), b"".join(map(bytes, pieces[1:])), [bytes(one) for one in entry.whole])
        for entry in joiner.entries
        for pieces in [entry.super_packet()]
    ]
    assert found == [(one.vnet, one.packet, one.split) for one in expected(batch, tcp=tcp, udp=udp)]


@MANY
@given(batches())
def test_a_run_continued_without_looking_at_each(batch: list[bytes]) -> None:
    """As packets of one GRO message are: offered to the last entry first, unchecked."""
    joiner = Joiner(tcp=True, udp=True)
    entry = None
    for packet in batch:
        if entry is None or not entry.extend(writable(packet)):
            entry = joiner.add(writable(packet))
    assert [bytes(one) for entry in joiner.entries for one in entry.whole if entry.count == 1] == [
        one.packet for one in expected(batch) if len(one.split) == 1
    ]


@settings(MANY, max_examples=1000)
@given(st.binary(max_size=200), st.integers(0, len(PACKED) - 1), st.integers(0, 255))
def test_tables_are_refused_as_the_reference_refuses(junk: bytes, at: int, octet: int) -> None:
    for packed in (junk, PACKED[:at], PACKED[:at] + bytes([octet]) + PACKED[at + 1 :]):
        try:
            reference.unpack(packed)
        except ValueError:
            with pytest.raises(ValueError, match=r"."):
                Table(packed)
        else:
            Table(packed)
