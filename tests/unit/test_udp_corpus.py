"""The fuzz target holds for its corpus, made here: `python -m tests.unit.test_udp_corpus` writes it anew.

`make fuzz` begins with these files; what it finds to be wrong is added to the corpus under a name of its own.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from flanneld_py.udp.reference import GSO_TCPV4, GSO_TCPV6, GSO_UDP, NEEDS_CSUM, TCP, UDP, Vnet
from tests.unit import packets
from tests.unit.packetcore import ROOT, build

CORPUS = ROOT / "tests" / "native" / "corpus"
TABLE, RECEIVE, SEND, JOIN, TABLE_MENDED, RECEIVE_MENDED, SEND_MENDED, JOIN_MENDED = (
    bytes([number]) for number in range(8)
)
"""First bytes: what fuzz_packet.c runs."""
A, B, OURS = packets.ADDRESSES4[0], packets.ADDRESSES4[2], packets.ADDRESSES4[3]
A6, OURS6 = packets.ADDRESSES6[0], packets.ADDRESSES6[3]
DATA = bytes(range(200))
STAMPS = bytes.fromhex("0101080a0000000100000002")


def _four(body: bytes, protocol: int, *, out: bool = False, options: bytes = b"", **fields: int) -> bytes:
    source, destination = (OURS, A) if out else (A, OURS)
    packet = packets.ipv4(source, destination, protocol, body, options=options, **fields)
    return packets.complete(packet, protocol) if protocol in {TCP, UDP} and len(body) >= 20 else packet


def _six(body: bytes, protocol: int, *, out: bool = False, ttl: int = 64) -> bytes:
    source, destination = (OURS6, A6) if out else (A6, OURS6)
    packet = packets.ipv6(source, destination, protocol, body, ttl=ttl)
    return packets.complete(packet, protocol) if protocol in {TCP, UDP} else packet


def _received() -> dict[str, bytes]:
    return {
        "tcp4": _four(packets.tcp(DATA, options=STAMPS), TCP),
        "udp4": _four(packets.udp(DATA), UDP),
        "tcp6": _six(packets.tcp(DATA), TCP),
        "options": _four(packets.udp(DATA), UDP, options=bytes.fromhex("940400000101070704000000")),
        "fragment": _four(DATA, UDP, field=0x2010),
        "ip-in-ip": _four(_four(packets.udp(DATA), UDP), 4),
        "ttl-0": _four(packets.udp(DATA), UDP, ttl=0),
        "extensions": _six(bytes([60, 0]) + bytes(6) + bytes([UDP, 0]) + bytes(6) + packets.udp(DATA), 0),
        "spoofed": packets.ipv4(B, OURS, UDP, packets.udp(DATA)),
        "elsewhere": packets.ipv4(A, B, UDP, packets.udp(DATA)),
        "short": b"\x45\x00\x00",
        "bare": _four(b"", 59),
        "bare6": _six(b"", 59),
    }


def _sent() -> dict[str, tuple[Vnet, int, bytes]]:
    tcp4 = _four(packets.tcp(DATA, options=STAMPS, flags=0x99), TCP, out=True, field=0x4000)
    udp4 = _four(packets.udp(DATA), UDP, out=True)
    tcp6, udp6 = _six(packets.tcp(DATA), TCP, out=True), _six(packets.udp(DATA), UDP, out=True)
    behind = _six(bytes([TCP, 0]) + bytes(6) + packets.tcp(DATA), 60, out=True)
    return {
        "plain": (Vnet(), 1472, udp4),
        "checksum": (Vnet(NEEDS_CSUM, 0, 0, 0, 20, 6), 1472, udp4),
        "tso4": (Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 48, 20, 16), 1472, tcp4),
        "tso6": (Vnet(NEEDS_CSUM, GSO_TCPV6, 0, 48, 40, 16), 1472, tcp6),
        "tso6-behind": (Vnet(NEEDS_CSUM, GSO_TCPV6, 0, 48, 48, 16), 1472, behind),
        "uso4": (Vnet(NEEDS_CSUM, GSO_UDP, 0, 48, 20, 6), 1472, udp4),
        "uso6": (Vnet(NEEDS_CSUM, GSO_UDP, 0, 48, 40, 6), 1472, udp6),
        "fragments": (Vnet(), 100, udp4),
        "fragments-options": (
            Vnet(),
            100,
            _four(packets.udp(DATA), UDP, out=True, options=bytes.fromhex("940400000101070704000000")),
        ),
        "too-big": (Vnet(), 100, tcp4),
        "ttl-1": (Vnet(), 1472, _four(packets.udp(DATA), UDP, out=True, ttl=1)),
        "no-route": (Vnet(), 1472, packets.ipv4(OURS, B, UDP, packets.udp(DATA))),
        "no-route-ping": (Vnet(), 1472, packets.ipv4(OURS, B, 1, b"\x08\x00" + bytes(6))),
        "ttl-1-icmp6": (Vnet(), 1472, _six(b"\x80\x00" + bytes(6), 58, out=True, ttl=1)),
    }


def _joined() -> dict[str, list[bytes]]:
    runs = {
        "tcp4": [
            _four(packets.tcp(DATA[:60], options=STAMPS, sequence=n * 60), TCP, field=0x4000, id=n)
            for n in range(4)
        ],
        "udp4": [_four(packets.udp(DATA[:60]), UDP, id=n) for n in range(4)],
        "tcp6": [_six(packets.tcp(DATA[:60], sequence=n * 60), TCP) for n in range(4)],
        "udp6": [_six(packets.udp(DATA[:60]), UDP) for n in range(4)],
    }
    mixed = [packet for several in zip(*runs.values(), strict=True) for packet in several]
    return {
        **runs,
        "mixed": mixed,
        "pushed": [
            *runs["tcp4"],
            _four(packets.tcp(DATA[:60], options=STAMPS, sequence=240, flags=0x18), TCP, field=0x4000),
        ],
        "shorter": [*runs["udp4"], _four(packets.udp(DATA[:9]), UDP, id=4)],
    }


def inputs() -> dict[str, bytes]:
    """Name → contents of the corpus' files."""
    found = _both("table", TABLE, TABLE_MENDED, A6 + packets.table())
    found |= _both("table-empty", TABLE, TABLE_MENDED, A6 + packets.table()[:92])
    for name, packet in _received().items():
        found |= _both(f"receive-{name}", RECEIVE, RECEIVE_MENDED, packet)
    for name, (vnet, mtu, packet) in _sent().items():
        found |= _both(f"send-{name}", SEND, SEND_MENDED, vnet.pack() + mtu.to_bytes(2, "big") + packet)
    for name, batch in _joined().items():
        joined = b"".join(len(one).to_bytes(2, "big") + one for one in batch)
        found |= _both(f"join-{name}", JOIN, JOIN_MENDED, joined)
    return found


def _both(name: str, first: bytes, mended: bytes, rest: bytes) -> dict[str, bytes]:
    return {name: first + rest, f"{name}-mended": mended + rest}


def test_the_corpus_is_what_is_made_here() -> None:
    for name, contents in inputs().items():
        assert (CORPUS / name).read_bytes() == contents, name


def test_the_fuzz_target_holds_for_the_corpus() -> None:
    files = sorted(CORPUS.iterdir())
    ran = subprocess.run([build("replay"), *files], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"{len(files)}\n"


def _write(place: Path) -> None:
    place.mkdir(exist_ok=True)
    for name, contents in inputs().items():
        (place / name).write_bytes(contents)


if __name__ == "__main__":
    _write(CORPUS)
