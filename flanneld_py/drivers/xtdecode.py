"""A legacy iptables table in the kernel's form, as chains (linux/netfilter_ipv4/ip_tables.h, x_tables.h).

A table is one block of entries. An entry is a fixed head, matches, and one target; where a chain begins and
ends follows from offsets and from entries that stand for nothing but a chain's name. Everything is
native-endian, addresses aside.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Collection, Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.drivers.xtextensions import comment_text, extension_match, extension_sets, extension_verdict
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey, Field, Hook, Match, Rule, Verdict

Family: TypeAlias = Literal["ip", "ip6"]

HOOKS: tuple[tuple[str, Hook], ...] = (
    ("PREROUTING", "prerouting"),
    ("INPUT", "input"),
    ("FORWARD", "forward"),
    ("OUTPUT", "output"),
    ("POSTROUTING", "postrouting"),
)
"""By number (linux/netfilter.h NF_INET_*): name of the builtin chain, hook."""
PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
"""linux/netfilter_ipv4.h NF_IP_PRI_*."""
NAT_PRIORITIES = {"PREROUTING": -100, "INPUT": 100, "OUTPUT": -100, "POSTROUTING": 100}

INFO = struct.Struct("@32sI5I5III")
"""struct ipt_getinfo: name, valid_hooks, hook_entry, underflow, num_entries, size."""
ENTRY = {
    "ip": struct.Struct("@4s4s4s4s16s16s16s16sHBBIHHIQQ"),
    "ip6": struct.Struct("@16s16s16s16s16s16s16s16sHxBBIHHIQQ"),
}
"""struct ipt_entry, ip6t_entry, as in `_Head`; ip6's tos is left out."""
COUNTERS = struct.Struct("@QQ")
NEXT_OFFSET = {"ip": 90, "ip6": 142}
PART = struct.Struct("@H29sB")
"""struct xt_entry_match and xt_entry_target: size with what follows, name, revision."""
NAME_SIZE = 30
"""XT_FUNCTION_MAXNAMELEN: of a chain's name in an entry that stands for that."""
VERDICT = struct.Struct("@i")
"""struct xt_standard_target."""

INV_IN, INV_OUT, INV_TOS, INV_SOURCE, INV_DESTINATION, INV_FRAGMENTS, INV_PROTO = (
    1 << bit for bit in range(7)
)
ACCEPT, DROP, QUEUE, RETURN = -2, -1, -4, -5
"""A verdict is negative and one off; from 0 on it is the offset to go on at."""
STANDARD = {
    ACCEPT: Verdict("accept"),
    DROP: Verdict("drop"),
    QUEUE: Verdict("queue"),
    RETURN: Verdict("return"),
}


class _Flags(NamedTuple):
    """Bits of an entry's flags; 0: there is no such flag."""

    protocol: int
    tos: int
    fragments: int
    goto: int


FLAGS: dict[Family, _Flags] = {"ip": _Flags(0, 0, 1, 2), "ip6": _Flags(1, 2, 0, 4)}


class TableInfo(NamedTuple):
    """What the kernel says of a table before it shows it."""

    valid_hooks: int
    hook_entry: tuple[int, ...]
    """By hook: where its builtin chain begins."""
    underflow: tuple[int, ...]
    """By hook: where its policy stands."""
    size: int


class _Head(NamedTuple):
    source: bytes
    destination: bytes
    source_mask: bytes
    destination_mask: bytes
    iif: bytes
    oif: bytes
    iif_mask: bytes
    oif_mask: bytes
    protocol: int
    flags: int
    inverted: int
    nfcache: int
    target_offset: int
    next_offset: int
    comefrom: int
    packets: int
    bytes_: int


class _Entry(Struct, frozen=True):
    """One entry, taken apart."""

    offset: int
    following: int
    matches: tuple[Match, ...]
    comment: str
    goto: bool
    target: str
    payload: bytes
    """What belongs to the target."""
    packets: int


def read_info(answer: bytes) -> TableInfo:
    """Of struct ipt_getinfo, which is the same for both families."""
    _, valid, *offsets, _, size = INFO.unpack(answer)
    return TableInfo(valid, tuple(offsets[:5]), tuple(offsets[5:]), size)


def without_counters(family: Family, entries: bytes) -> bytes:
    """The same with all counters at zero.

    Raises:
        KernelError: the kernel's answer makes no sense.
    """
    blank = bytearray(entries)
    head = ENTRY[family].size
    nothing = bytes(COUNTERS.size)
    for offset, _ in _offsets(family, entries):
        blank[offset + head - COUNTERS.size : offset + head] = nothing
    return bytes(blank)


def decode_table(
    family: Family, table: str, info: TableInfo, entries: bytes, only: Collection[str] | None = None
) -> dict[ChainKey, Chain]:
    """Chains of a table, the builtin ones first; `only`: the names of those that matter.

    Raises:
        KernelError: the kernel's answer makes no sense.
    """
    try:
        return {
            ChainKey("legacy", family, table, name): chain
            for name, chain in _chains(family, table, info, entries, only).items()
        }
    except struct.error as error:
        raise _nonsense(family, str(error)) from error


def _chains(
    family: Family, table: str, info: TableInfo, entries: bytes, only: Collection[str] | None
) -> dict[str, Chain]:
    builtin = {
        info.hook_entry[number]: number for number in range(len(HOOKS)) if info.valid_hooks & 1 << number
    }
    spans = list(_offsets(family, entries))
    names = {offset: name for offset, _ in spans if (name := _name_at(family, entries, offset)) is not None}
    # Such an entry stands where a chain of the user's begins; the last one is the table's end.
    users = {following: names[offset] for offset, following in spans[:-1] if offset in names}
    starts = users | {offset: HOOKS[number][0] for offset, number in builtin.items()}
    rules: dict[str, list[Rule]] = {HOOKS[number][0]: [] for number in builtin.values()}
    rules |= {name: [] for name in users.values()}
    if only is not None:
        rules = {name: found for name, found in rules.items() if name in only}
    current: list[Rule] | None = None
    for offset, following in spans:
        if offset in starts:
            current = rules.get(starts[offset])
        if current is not None and offset not in names:
            current.append(_rule(family, _decode_entry(family, entries, offset, following), starts))
    base = {HOOKS[number][0]: _base_chain(table, number) for number in builtin.values()}
    return {name: _closed(base.get(name, Chain()), found) for name, found in rules.items()}


def _name_at(family: Family, entries: bytes, offset: int) -> str | None:
    """Of an entry that stands for nothing but a chain's name."""
    at = offset + NEXT_OFFSET[family] - 2
    target = offset + int.from_bytes(entries[at : at + 2], sys.byteorder)
    if not entries.startswith(b"ERROR\0", target + 2):
        return None
    return _text(entries[target + PART.size : target + PART.size + NAME_SIZE])


def _base_chain(table: str, number: int) -> Chain:
    name, hook = HOOKS[number]
    if table == "nat":
        return Chain((), hook, "nat", NAT_PRIORITIES.get(name, 0))
    return Chain((), hook, "filter", PRIORITIES.get(table, 0))


def _closed(chain: Chain, rules: list[Rule]) -> Chain:
    """With its rules but the last, which is a builtin chain's policy, and what ends one of the user's."""
    if not chain.hook:
        return replace(chain, rules=tuple(rules[:-1]))
    return replace(chain, rules=tuple(rules[:-1]), policy=rules[-1].verdict.kind if rules else "accept")


def _offsets(family: Family, entries: bytes) -> Iterator[tuple[int, int]]:
    """Where each entry begins and ends."""
    at = NEXT_OFFSET[family]
    head = ENTRY[family].size
    offset = 0
    while offset < len(entries):
        if offset + head > len(entries):
            raise _nonsense(family, f"entry at {offset} ends early")
        length = int.from_bytes(entries[offset + at : offset + at + 2], sys.byteorder)
        if length < head + PART.size or offset + length > len(entries):
            raise _nonsense(family, f"entry at {offset} has length {length}")
        yield offset, offset + length
        offset += length


def _nonsense(family: Family, why: str) -> KernelError:
    return KernelError(f"cannot understand the {family}tables entries that the kernel shows: {why}")


def _decode_entry(family: Family, entries: bytes, offset: int, following: int) -> _Entry:
    head = _Head._make(ENTRY[family].unpack_from(entries, offset))
    matches = list(_head_matches(family, head))
    comment = ""
    at = offset + ENTRY[family].size
    while at < offset + head.target_offset:
        name, revision, payload = _part(family, entries, at)
        if name == "comment":
            comment = comment_text(payload)
        else:
            matches.append(extension_match(name, revision, payload))
        at += PART.size + len(payload)
    target, _, payload = _part(family, entries, offset + head.target_offset)
    goto = bool(head.flags & FLAGS[family].goto)
    return _Entry(offset, following, tuple(matches), comment, goto, target, payload, head.packets)


def _part(family: Family, entries: bytes, at: int) -> tuple[str, int, bytes]:
    """Name, revision and payload of a match or target."""
    length, name, revision = PART.unpack_from(entries, at)
    if length < PART.size or at + length > len(entries):
        raise _nonsense(family, f"a match at {at} has length {length}")
    return _text(name), revision, entries[at + PART.size : at + length]


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")


# --- matches --------------------------------------------------------------------------------------


def _head_matches(family: Family, head: _Head) -> Iterator[Match]:
    inverted, bits = head.inverted, FLAGS[family]
    yield from _address("saddr", head.source, head.source_mask, negated=bool(inverted & INV_SOURCE))
    yield from _address(
        "daddr", head.destination, head.destination_mask, negated=bool(inverted & INV_DESTINATION)
    )
    yield from _interface("iifname", head.iif, head.iif_mask, negated=bool(inverted & INV_IN))
    yield from _interface("oifname", head.oif, head.oif_mask, negated=bool(inverted & INV_OUT))
    if head.protocol and head.flags & bits.protocol == bits.protocol:
        yield Match("l4proto", (head.protocol,), negated=bool(inverted & INV_PROTO))
    if head.flags & bits.tos:
        yield Match("other", ("tos",), negated=bool(inverted & INV_TOS))
    if head.flags & bits.fragments:
        yield Match("other", ("fragment",), negated=bool(inverted & INV_FRAGMENTS))


def _address(field: Field, base: bytes, mask: bytes, *, negated: bool) -> Iterator[Match]:
    """A condition on an address; none when all bits of the mask are zero, unless that is turned round."""
    if not any(mask) and not negated:
        return
    width = 8 * len(mask)
    bits = f"{int.from_bytes(mask, 'big'):0{width}b}"
    length = bits.count("1")
    if "01" in bits:
        yield Match("other", (f"{field} {base.hex()}/{mask.hex()}",), negated)
        return
    network = IPv4Network if width == 32 else IPv6Network
    yield Match(field, (network((base, length), strict=False),), negated)


def _interface(field: Field, name: bytes, mask: bytes, *, negated: bool) -> Iterator[Match]:
    """A condition on a device: on its whole name, where the mask covers the NUL, too, or on its beginning."""
    compared = name[: len(mask.rstrip(b"\0"))]
    if not compared and not negated:
        return
    exact = compared.endswith(b"\0")
    text = _text(compared)
    if exact and text.endswith("*"):
        yield Match("other", (f"{field} {text}",), negated)  # a star that stands for itself
        return
    yield Match(field, (text if exact else f"{text}*",), negated)


def _rule(family: Family, entry: _Entry, starts: dict[int, str]) -> Rule:
    if not entry.target:
        verdict = _standard(entry, starts)
    else:
        verdict = extension_verdict(entry.target, entry.payload, 4 if family == "ip" else 6)
    sets = extension_sets(entry.target)
    return Rule(entry.matches, verdict, entry.comment, packets=entry.packets, sets=sets)


def _standard(entry: _Entry, starts: dict[int, str]) -> Verdict:
    (number,) = VERDICT.unpack_from(entry.payload)
    if number == entry.following:
        return Verdict("none")  # a rule without a target
    if number < 0:
        return STANDARD.get(number, Verdict("unknown"))
    if number not in starts:
        return Verdict("unknown")
    return Verdict("goto" if entry.goto else "jump", starts[number])
