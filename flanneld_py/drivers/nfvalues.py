"""What a comparison of an nf_tables register says about a packet: the kernel's numbers as values of ours."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, summarize_address_range
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.drivers.xtextensions import CT_STATES, CT_STATUSES, bit_names
from flanneld_py.packetfilter import Field, Mark, Match, Value

Span: TypeAlias = tuple[int, int]
"""From … to, both included: a register's bytes as big-endian numbers."""

STATES = (*CT_STATES, (0x40, "untracked"))
ETHERTYPES = {0x0800: 4, 0x86DD: 6}
NFPROTOS = {2: 4, 10: 6}
IFNAMSIZ = 16
MOST_IN_TEXT = 8
"""Values that a text for the operator names."""


class Loaded(Struct, frozen=True):
    """What is in a register: `size` bytes of a field, and-ed with `mask`, then xor-ed with `flip`."""

    field: Field
    text: str
    """How nft calls it."""
    size: int
    """Bytes; 0 where nobody cares. Of an address it may be the first few only."""
    version: int = 0
    """Of an address: 4 or 6."""
    mask: int | None = None
    flip: int = 0
    host_order: bool = False
    """Whether it is a number as the host has it, and not as on the wire."""
    words: tuple[str, ...] = ()
    """What a text says for numbers."""

    def masked(self, mask: int, flip: int) -> Loaded:
        """What is there after a `bitwise` expression."""
        before = self.whole if self.mask is None else self.mask
        after = before & mask
        return replace(self, mask=None if after == self.whole else after, flip=(self.flip & mask) ^ flip)

    @property
    def whole(self) -> int:
        """The mask that leaves everything."""
        return (1 << 8 * self.size) - 1


def match_of(loaded: Loaded, spans: Sequence[Span], negated: bool) -> Match:
    """The condition that a register is in one of these spans, or is in none of them."""
    if loaded.flip and all(low == high for low, high in spans):
        spans = [(low ^ loaded.flip, low ^ loaded.flip) for low, _ in spans]
        loaded = replace(loaded, flip=0)
    values = None if loaded.flip else _values(loaded, spans)
    if loaded.field in ("ct state", "ct status") and values is None:
        values, turned = _any_bit(loaded, spans)
        negated ^= turned
    if values is None:
        return Match("other", (_text(loaded, spans),), negated)
    return Match(loaded.field, tuple(values), negated)


def _values(loaded: Loaded, spans: Sequence[Span]) -> list[Value] | None:
    convert = CONVERTERS.get(loaded.field)
    if convert is None or loaded.size == 0:
        return None
    found: dict[Value, None] = {}
    for low, high in spans:
        values = convert(loaded, low, high) if low <= high <= loaded.whole else None
        if values is None:
            return None
        found.update(dict.fromkeys(values))
    return _in_order(loaded.field, found)


def _in_order(name: Field, values: Iterable[Value]) -> list[Value]:
    """Sets have no order, so that equal ones are equal here."""
    if name == "ct state":
        return [state for _, state in STATES if state in set(values)]
    return sorted(values)


def _text(loaded: Loaded, spans: Sequence[Span]) -> str:
    if not spans:
        return loaded.text
    shown = [
        _shown(loaded, low) if low == high else f"{_shown(loaded, low)}-{_shown(loaded, high)}"
        for low, high in spans[:MOST_IN_TEXT]
    ]
    if len(spans) > MOST_IN_TEXT:
        shown.append("…")
    mask = "" if loaded.mask is None else f" & {_shown(loaded, loaded.mask)}"
    return f"{loaded.text}{mask} {','.join(shown)}"


def _shown(loaded: Loaded, value: int) -> str:
    number = _native(value) if loaded.host_order and value < 1 << 32 else value
    return loaded.words[number] if number < len(loaded.words) else str(number)


# --- fields ---------------------------------------------------------------------------------------


def _addresses(loaded: Loaded, low: int, high: int) -> Sequence[Value] | None:
    width = 32 if loaded.version == 4 else 128
    bits = 8 * loaded.size
    if bits > width:
        return None
    if loaded.mask is not None:
        length = loaded.mask.bit_count()
        contiguous = loaded.mask == loaded.whole >> (bits - length) << (bits - length)
        if not contiguous or low != high or low & ~loaded.mask:
            return None
    else:
        length = bits - (high - low).bit_length()
        if low >> (bits - length) << (bits - length) != low or high - low != (1 << bits - length) - 1:
            length = -1
    low, high = low << width - bits, (high + 1 << width - bits) - 1
    if loaded.version == 4:
        if length >= 0:
            return (IPv4Network((low, length)),)
        return tuple(summarize_address_range(IPv4Address(low), IPv4Address(high)))
    if length >= 0:
        return (IPv6Network((low, length)),)
    return tuple(summarize_address_range(IPv6Address(low), IPv6Address(high)))


def _marks(loaded: Loaded, low: int, high: int) -> Sequence[Value] | None:
    if low != high:
        return None
    mask = loaded.whole if loaded.mask is None else loaded.mask
    return (Mark(_native(low), _native(mask)),)


def _devices(loaded: Loaded, low: int, high: int) -> Sequence[Value] | None:
    if loaded.mask is not None:
        return None
    if loaded.size != IFNAMSIZ:
        try:
            return (socket.if_indextoname(_native(low)),) if low == high else None
        except OSError:
            return None  # no such device
    first, last = low.to_bytes(IFNAMSIZ, "big"), high.to_bytes(IFNAMSIZ, "big")
    if b"\0" in first.rstrip(b"\0"):
        return None
    common = 0
    while common < IFNAMSIZ and first[common] == last[common]:
        common += 1
    if first[common:].strip(b"\0") or last[common:].strip(b"\xff"):
        return None
    whole = common == IFNAMSIZ or b"\0" in first[:common]
    text = first[:common].rstrip(b"\0").decode(errors="replace")
    return (text if whole else f"{text}*",)


def _protocols(loaded: Loaded, low: int, high: int) -> Sequence[Value] | None:
    return range(low, high + 1) if loaded.mask is None else None


def _versions(loaded: Loaded, low: int, high: int) -> Sequence[Value] | None:
    known = ETHERTYPES if loaded.size == 2 else NFPROTOS
    return (known[low],) if loaded.mask is None and low == high and low in known else None


def _states(loaded: Loaded, low: int, high: int) -> Sequence[Value] | None:
    """A packet is in one state, of which the register has the bit."""
    if low != high or loaded.mask is not None:
        return None
    bits = _native(low)
    return bit_names(bits, STATES) if bits.bit_count() == 1 else None


CONVERTERS: Mapping[Field, Callable[[Loaded, int, int], Sequence[Value] | None]] = {
    "saddr": _addresses,
    "daddr": _addresses,
    "mark": _marks,
    "iifname": _devices,
    "oifname": _devices,
    "l4proto": _protocols,
    "nfproto": _versions,
    "ct state": _states,
}


def _any_bit(loaded: Loaded, spans: Sequence[Span]) -> tuple[list[Value] | None, bool]:
    """The names of the bits in the mask, any of which counts; and whether it is the comparison turned round.

    nft asks for `established,related` by and-ing with both bits and finding that the result is not zero.
    """
    names = STATES if loaded.field == "ct state" else CT_STATUSES
    if loaded.mask is None or len(spans) != 1 or spans[0][0] != spans[0][1]:
        return None, False
    mask, value = _native(loaded.mask), _native(spans[0][0])
    if value == 0:
        found = bit_names(mask, names)
        return (list(found) if found else None), True
    if value == mask and mask.bit_count() == 1:
        found = bit_names(mask, names)
        return (list(found) if found else None), False
    return None, False


def _native(number: int) -> int:
    """A number of four bytes as the host has it in memory."""
    return int.from_bytes((number & 0xFFFF_FFFF).to_bytes(4, "big"), sys.byteorder)
