"""Every reason for which the udp data plane drops a packet is documented, with its direction; no other is."""

from __future__ import annotations

import re
from pathlib import Path

from flanneld_py.core.losses import TOLD
from flanneld_py.udp.pycounts import DROP_REASONS, ONE_WAY

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `([a-z0-9-]+)` \| (tx|rx|tx, rx) \| (.+) \| (.+) \|$", re.MULTILINE)
NOT_COUNTED = "none"
SENT, RECEIVED = ("send.c", "segment.c", "lanes.c"), ("receive.c",)


def rows() -> list[tuple[str, str, str, str]]:
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("### What becomes of each packet")[2].partition("\n## ")[0]
    return ROW.findall(section)


def test_the_table_has_the_reasons_of_the_code_in_their_order() -> None:
    assert [reason for reason, *_ in rows()] == [name for name in DROP_REASONS if name != NOT_COUNTED]


def test_each_row_says_something() -> None:
    for reason, _, meaning, advice in rows():
        assert len(meaning) > 10, reason
        assert advice, reason


def test_directions_are_those_in_which_the_code_drops() -> None:
    """By the functions that give these reasons: packet_accept for what comes, packet_route for what goes."""
    source = {path.name: path.read_text() for path in (ROOT / "flanneld_py" / "udp").glob("*.c")}
    symbols = dict(re.findall(r'X\((DROP_[A-Z0-9_]+), "([a-z0-9-]+)"\)', header()))
    packet = source["packet.c"]
    parse = packet[
        packet.index("static enum drop parse4") : packet.index("static bool header_checksum_right")
    ]
    accept = packet[packet.index("enum drop packet_accept(") : packet.index("enum drop packet_route(")]
    route = packet[packet.index("enum drop packet_route(") :]
    places = {
        "tx": parse + route + "".join(source[name] for name in SENT),
        "rx": parse + accept + "".join(source[name] for name in RECEIVED),
    }
    for reason, directions, *_ in rows():
        (symbol,) = [symbol for symbol, name in symbols.items() if name == reason]
        found = [way for way, text in places.items() if re.search(rf"\b{symbol}\b", text)]
        assert ", ".join(found) == directions, reason


def test_reasons_of_one_direction_are_shown_for_that_alone() -> None:
    ways = {"send": "tx", "receive": "rx"}
    for way, reasons in ONE_WAY.items():
        assert {reason for reason, directions, *_ in rows() if directions == ways[way]} == reasons


def test_the_drops_that_are_told_of_are_named() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    sentence = next(
        line for line in text.splitlines() if line.endswith("mean lost traffic. One that was counted")
    )
    assert set(re.findall(r"`([a-z-]+)`", sentence)) == {name.partition(".")[2] for name in TOLD}


def header() -> str:
    return (ROOT / "flanneld_py" / "udp" / "packet.h").read_text()
