"""The key of a record: the last part of `P/subnets/…`, any bytes."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import TYPE_CHECKING

from flanneld_py.core.records import format_key, parse_key
from flanneld_py.errors import RecordError
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

HALF = re.compile(r"([0-9a-f.:]+)-([0-9]+)", re.ASCII)


def check(data: bytes) -> None:
    name = data.decode("utf-8", "backslashreplace")  # as the driver shows what is no text
    try:
        subnets = parse_key(name)
    except RecordError as error:
        one_line(str(error)[:300], "subnet", "canonical")
        assert not is_key(name), f"refused: {name!r}"
        return
    assert subnets.values()
    assert format_key(subnets) == name, "one subnet, two keys"
    assert is_key(name), f"taken: {name!r}"
    assert parse_key(format_key(subnets)) == subnets
    assert all(net.prefixlen < net.max_prefixlen for net in subnets.values())


def is_key(name: str) -> bool:
    """The same question put to `ipaddress` alone."""
    v4, ampersand, v6 = name.partition("&")
    try:
        halves = [_half(v4, 4), *([_half(v6, 6)] if ampersand else [])]
    except ValueError:
        return False
    return any(halves)


def _half(text: str, version: int) -> str:
    """Of one family; empty: it says that there is none."""
    if (version, text) == (4, "0.0.0.0-0"):
        return ""
    match = HALF.fullmatch(text)
    if match is None:
        raise ValueError(text)
    net = ip_network(f"{match[1]}/{match[2]}")
    if net.version != version or net.prefixlen == net.max_prefixlen or str(net) != f"{match[1]}/{match[2]}":
        raise ValueError(text)
    if version == 6 and net.prefixlen == 0:
        raise ValueError(text)
    return text


def seeds() -> Iterator[bytes]:
    yield from (
        *(b"10.5.34.0-24", b"10.5.34.0-24&fd00:5:0:22::-64", b"0.0.0.0-0&fd00:5:0:22::-64", b"0.0.0.0-0"),
        *(b"10.5.34.1-24", b"10.5.34.0-31", b"10.5.34.0-32", b"128.0.0.0-1", b"10.5.34.0-024", b"::-0", b""),
        *(b"10.5.34.0/24", b"10.5.34.0-24\n", b"10.5.34.0-24&", "10.5.34.٣-24".encode(), b"\xff10.5.34.0-24"),
        *(b"10.5.34.0-24&fd00:0::-64", b"10.5.34.0-24&FD00::-64", b"0.0.0.0-0&::ffff:1.2.3.4-127"),
    )


TARGET = Target(check, seeds, words=("0.0.0.0-0", "&", "-24", "-64", "::", "fd00:5:0:22::", "10.5.34.0"))
