"""What the expressions of an nf_tables rule mean, as matches and a verdict.

A rule loads parts of a packet into registers, changes them there, and compares. So this is a small machine
that keeps with each register what was loaded into it, and turns every comparison into a condition on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.drivers import nfmessages as nf
from flanneld_py.drivers.nfvalues import Loaded, Span, match_of
from flanneld_py.drivers.xtextensions import (
    RANDOM_FULLY,
    comment_text,
    extension_match,
    extension_sets,
    extension_verdict,
)
from flanneld_py.packetfilter import Field, Match, Verdict

Attributes: TypeAlias = Mapping[int, bytes]

CMP_EQ, CMP_NEQ, CMP_LT, CMP_LTE, CMP_GT, CMP_GTE = range(6)
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
LOOKUP_INVERTED = 0x1
REGISTER_SLOTS = 16
"""Of four bytes each; NFT_REG_1 … NFT_REG_4 are four of them."""
NO_VERDICT = Verdict("none")
VERDICTS: Mapping[int, Verdict] = {
    0: Verdict("drop"),
    1: Verdict("accept"),
    3: Verdict("queue"),
    -1: NO_VERDICT,  # NFT_CONTINUE
    -2: NO_VERDICT,  # NFT_BREAK
    -5: Verdict("return"),
}
JUMP, GOTO = -3, -4
OBJECT_NAMES = {2: "quota", 4: "limit", 5: "ct count"}
"""Named objects of which a rule asks something (NFT_OBJECT_*); of others it only makes use."""
STATEMENTS = frozenset({"counter", "dup", "flow_offload", "last", "log"})
"""Expressions that neither ask nor decide anything."""
CONDITIONS = frozenset({"connlimit", "dynset", "limit", "quota"})
"""Expressions that ask for what no packet shows."""
META: Mapping[int, tuple[Field, str, int]] = {
    1: ("nfproto", "protocol", 2),
    3: ("mark", "mark", 4),
    4: ("iifname", "iif", 4),
    5: ("oifname", "oif", 4),
    6: ("iifname", "iifname", 16),
    7: ("oifname", "oifname", 16),
    10: ("other", "skuid", 4),
    11: ("other", "skgid", 4),
    15: ("nfproto", "nfproto", 1),
    16: ("l4proto", "l4proto", 1),
    19: ("other", "pkttype", 1),
    21: ("other", "iifgroup", 4),
    22: ("other", "oifgroup", 4),
}
"""NFT_META_* → field, name, bytes."""
META_MARK = 3
META_NUMBERED = (4, 5)
"""Those that tell a device by its number."""
CT: Mapping[int, tuple[Field, str, int]] = {
    0: ("ct state", "ct state", 4),
    1: ("other", "ct direction", 1),
    2: ("ct status", "ct status", 4),
    3: ("other", "ct mark", 4),
}
"""NFT_CT_* → field, name, bytes."""
FIB_TYPE = 3
FIB_ASKED = ((0x1, "saddr"), (0x2, "daddr"), (0x4, "mark"), (0x8, "iif"), (0x10, "oif"))
"""NFTA_FIB_F_*."""
FIB_RESULTS = {1: "oif", 2: "oifname", FIB_TYPE: "type"}
ROUTE_TYPES = (
    "unspec",
    "unicast",
    "local",
    "broadcast",
    "anycast",
    "multicast",
    "blackhole",
    "unreachable",
    "prohibit",
)
"""linux/rtnetlink.h RTN_*."""
ADDRESSES: Mapping[int, tuple[tuple[int, Field], ...]] = {
    4: ((12, "saddr"), (16, "daddr")),
    6: ((8, "saddr"), (24, "daddr")),
}
"""Where the addresses are in a header of each version."""
IPV4_PROTOCOL = 9
PORTS = {(0, 2): "sport", (2, 2): "dport"}
"""What is at these bytes of TCP, UDP, SCTP and DCCP headers."""
NOT_A_REGISTER = Loaded("other", "an unknown register", 0)


class Elements(NamedTuple):
    """The elements of a set or a verdict map, as far as we read them."""

    key_length: int
    """Bytes of a key."""
    spans: Sequence[Span]
    """Keys from … to, as big-endian numbers."""
    verdicts: Sequence[Verdict] = ()
    """Of a verdict map: one for each span."""


ElementsOf: TypeAlias = Callable[[str], Elements | None]
"""By a set's name; None for one that we do not take apart."""


def verdict_of(data: bytes) -> Verdict:
    """The content of an NFTA_DATA_VERDICT."""
    found = dict(nf.listed(data))
    code = nf.signed(found, nf.VERDICT_CODE)
    if code in (JUMP, GOTO):
        return Verdict("jump" if code == JUMP else "goto", nf.name(found, nf.VERDICT_CHAIN))
    return VERDICTS.get(code & 0xFF if code > 0 else code, Verdict("unknown"))


class Meaning(NamedTuple):
    """What a rule asks for and does."""

    ways: tuple[tuple[tuple[Match, ...], Verdict], ...]
    """One, or one for each element of a verdict map: the rule is as so many rules."""
    comment: str
    sets: frozenset[Field]
    lasting: bool
    """Whether the same expressions always mean this: they refer to no set and to no device's number."""


def split_counters(expressions: bytes) -> tuple[tuple[bytes, ...], int | None]:
    """The expressions of NFTA_RULE_EXPRESSIONS that are no counters, and how many packets those counted."""
    asked, packets = [], None
    for _, element in nf.listed(expressions):
        if element.startswith(nf.COUNTER):
            found = dict(nf.listed(dict(nf.listed(element)).get(nf.EXPR_DATA, b"")))
            packets = nf.number(found, nf.COUNTER_PACKETS)
        else:
            asked.append(element)
    return tuple(asked), packets


def decode_expressions(family: nf.Family, expressions: Iterable[bytes], elements_of: ElementsOf) -> Meaning:
    """The meaning of a rule.

    Args:
        family: the table's.
        expressions: the payloads of NFTA_LIST_ELEM.
        elements_of: tells the elements of the table's sets.
    """
    machine = _Machine(family, elements_of)
    for element in expressions:
        found = dict(nf.listed(element))
        machine.carry_out(nf.name(found, nf.EXPR_NAME), dict(nf.listed(found.get(nf.EXPR_DATA, b""))))
    branches = machine.branches or [((), machine.verdict)]
    ways = tuple(((*machine.matches, *more), verdict) for more, verdict in branches)
    return Meaning(ways, machine.comment, frozenset(machine.sets), machine.lasting)


class _Machine(Struct):
    family: nf.Family
    elements_of: ElementsOf
    matches: list[Match] = field(default_factory=list)
    verdict: Verdict = NO_VERDICT
    branches: list[tuple[tuple[Match, ...], Verdict]] = field(default_factory=list)
    comment: str = ""
    sets: set[Field] = field(default_factory=set)
    registers: dict[int, Loaded] = field(default_factory=dict)
    version: int = 0
    """4 or 6 where the table or an earlier match says which packets these are."""
    lower: tuple[Loaded, int] | None = None
    """What the last match compared with its lowest value; the highest may follow."""
    lasting: bool = True

    def __post_init__(self) -> None:
        self.version = {"ip": 4, "ip6": 6}.get(self.family, 0)

    def carry_out(self, name: str, found: Attributes) -> None:
        lower, self.lower = self.lower, None
        if name == "cmp":
            self.compare(found, lower)
        elif (step := STEPS.get(name)) is not None:
            step(self, found)
        elif name in CONDITIONS:
            self.matches.append(Match("other", (name,)))
        elif name not in STATEMENTS:
            # What loads something says where to, in the same attribute for all but the two named.
            register = nf.number(found, 2 if name in ("hash", "tunnel") else 1)
            if name in LOADERS and register:
                self.load(register, Loaded("other", name, 0))
            elif name not in LOADERS:
                self.matches.append(Match("other", (name,)))
                self.verdict = Verdict("unknown")

    # --- registers --------------------------------------------------------------------------------

    def load(self, register: int, loaded: Loaded) -> None:
        slot = _slot(register)
        last = slot + max(1, loaded.size + 3 >> 2)
        for other, there in list(self.registers.items()):
            if other < last and slot < other + max(1, there.size + 3 >> 2):
                del self.registers[other]
        self.registers[slot] = loaded

    def loaded(self, found: Attributes, kind: int) -> Loaded:
        return self.registers.get(_slot(nf.number(found, kind)), NOT_A_REGISTER)

    def payload(self, found: Attributes) -> None:
        if 1 not in found:
            self.sets |= {"saddr", "daddr"}  # it writes into the packet
            return
        base, offset, size = (nf.number(found, kind) for kind in (2, 3, 4))
        size = min(size, 4 * REGISTER_SLOTS)  # more fits into no register
        self.load(nf.number(found, 1), self.header_part(base, offset, size))

    def header_part(self, base: int, offset: int, size: int) -> Loaded:
        if base == NETWORK_HEADER:
            width = 4 if self.version == 4 else 16
            for at, name in ADDRESSES.get(self.version, ()):
                if at == offset and 0 < size <= width:
                    return Loaded(name, name, size, self.version)
            if self.version == 4 and (offset, size) == (IPV4_PROTOCOL, 1):
                return Loaded("l4proto", "l4proto", 1)
        if base == TRANSPORT_HEADER and (offset, size) in PORTS:
            return Loaded("other", PORTS[offset, size], size)
        header = {0: "link", 1: "network", 2: "transport"}.get(base, "inner")
        return Loaded("other", f"{header} header bytes {offset}-{offset + size - 1}", size)

    def meta(self, found: Attributes) -> None:
        key = nf.number(found, 2)
        if 1 not in found:
            if key == META_MARK:
                self.sets.add("mark")
            return
        self.lasting &= key not in META_NUMBERED
        name, text, size = META.get(key, ("other", f"meta {key}", 0))
        self.load(nf.number(found, 1), Loaded(name, text, size, host_order=size == 4))

    def ct(self, found: Attributes) -> None:
        if 1 not in found:
            return  # it sets the connection's mark, zone or the like
        key = nf.number(found, 2)
        name, text, size = CT.get(key, ("other", f"ct {key}", 0))
        self.load(nf.number(found, 1), Loaded(name, text, size, host_order=size == 4))

    def fib(self, found: Attributes) -> None:
        flags, result = nf.number(found, 3), nf.number(found, 2)
        asked = " . ".join(text for bit, text in FIB_ASKED if flags & bit)
        text = f"fib {asked} {FIB_RESULTS.get(result, result)}"
        words = ROUTE_TYPES if result == FIB_TYPE else ()
        self.load(nf.number(found, 1), Loaded("other", text, 4 if words else 0, host_order=True, words=words))

    def bitwise(self, found: Attributes) -> None:
        source = self.loaded(found, 1)
        mask, flip = (dict(nf.listed(found.get(kind, b""))).get(nf.DATA_VALUE, b"") for kind in (4, 5))
        if nf.number(found, 6) or len(mask) != source.size or len(flip) != len(mask):
            result = replace(source, field="other")  # a shift, or of two registers
        else:
            result = source.masked(int.from_bytes(mask, "big"), int.from_bytes(flip, "big"))
        self.load(nf.number(found, 2), result)

    def byteorder(self, found: Attributes) -> None:
        self.load(nf.number(found, 2), replace(self.loaded(found, 1), field="other", host_order=False))

    def immediate(self, found: Attributes) -> None:
        data = dict(nf.listed(found.get(2, b"")))
        if nf.DATA_VERDICT in data:
            self.verdict = verdict_of(data[nf.DATA_VERDICT])
        else:
            self.load(nf.number(found, 1), NOT_A_REGISTER)

    # --- conditions -------------------------------------------------------------------------------

    def ask(self, loaded: Loaded, spans: Sequence[Span], negated: bool) -> None:
        found = match_of(loaded, spans, negated)
        if found.field == "nfproto" and not found.negated and len(found.values) == 1:
            self.version = 6 if found.values[0] == 6 else 4
        self.matches.append(found)

    def compare(self, found: Attributes, lower: tuple[Loaded, int] | None) -> None:
        loaded, operator = self.loaded(found, 1), nf.number(found, 2)
        value = dict(nf.listed(found.get(3, b""))).get(nf.DATA_VALUE, b"")
        size = loaded.size or len(value)
        if len(value) > size:
            value = value[:size]
        # A shorter value is compared with the first bytes only.
        rest = 8 * (size - len(value))
        low = int.from_bytes(value, "big") << rest
        high = low | (1 << rest) - 1
        top = (1 << 8 * size) - 1
        spans = {
            CMP_LT: [(0, low - 1)] if low else [],
            CMP_LTE: [(0, high)],
            CMP_GT: [(high + 1, top)] if high < top else [],
            CMP_GTE: [(low, top)],
        }.get(operator, [(low, high)])
        if operator == CMP_LTE and lower is not None and lower[0] is loaded and lower[1] <= high:
            self.matches.pop()
            spans = [(lower[1], high)]
        self.ask(loaded, spans, operator == CMP_NEQ)
        self.lower = (loaded, low) if operator == CMP_GTE else None

    def range(self, found: Attributes) -> None:
        low, high = (
            int.from_bytes(dict(nf.listed(found.get(kind, b""))).get(nf.DATA_VALUE, b""), "big")
            for kind in (3, 4)
        )
        self.ask(self.loaded(found, 1), [(low, high)], nf.number(found, 2) == 1)

    def lookup(self, found: Attributes) -> None:
        self.lasting = False
        loaded, name = self.loaded(found, 2), nf.name(found, 1)
        elements = self.elements_of(name) if loaded.field != "other" else None
        if elements is not None and elements.key_length != loaded.size:
            elements = None  # the key is of several registers
        there = "a set" if name.startswith("__") else f"@{name}"
        asked = Match("other", (f"{loaded.text} in {there}",), bool(nf.number(found, 5) & LOOKUP_INVERTED))
        if 3 not in found:
            if elements is None:
                self.matches.append(asked)
            else:
                self.ask(loaded, elements.spans, asked.negated)
        elif nf.number(found, 3):
            self.matches.append(asked)  # the map's value goes into a register
            self.load(nf.number(found, 3), NOT_A_REGISTER)
        elif elements is None or not elements.verdicts:
            self.matches.append(asked)
            self.verdict = Verdict("unknown")
        else:
            self.branches = [
                ((match_of(loaded, [span], negated=False),), verdict)
                for span, verdict in zip(elements.spans, elements.verdicts, strict=True)
            ]

    def match(self, found: Attributes) -> None:
        name, info = nf.name(found, 1), found.get(3, b"")
        if name == "comment":
            self.comment = comment_text(info)
        else:
            self.matches.append(extension_match(name, nf.number(found, 2), info))

    # --- what is done -----------------------------------------------------------------------------

    def target(self, found: Attributes) -> None:
        name = nf.name(found, 1)
        self.verdict = extension_verdict(name, found.get(3, b""), 6 if self.version == 6 else 4)
        self.sets |= extension_sets(name)

    def masquerade(self, found: Attributes) -> None:
        flags = nf.number(found, 1)
        if flags & ~RANDOM_FULLY or 2 in found:
            self.verdict = Verdict("nat")  # to ports that are given, or at random in the old way
        else:
            self.verdict = Verdict("masquerade", fully_random=flags == RANDOM_FULLY)

    def notrack(self, _: Attributes) -> None:
        self.sets.add("ct state")

    def translate(self, _: Attributes) -> None:
        self.verdict = Verdict("nat")

    def reject(self, _: Attributes) -> None:
        self.verdict = Verdict("reject")

    def queue(self, _: Attributes) -> None:
        self.verdict = Verdict("queue")

    def object(self, found: Attributes) -> None:
        if 1 not in found or nf.number(found, 1) in OBJECT_NAMES:
            self.matches.append(Match("other", (OBJECT_NAMES.get(nf.number(found, 1), "objects of a map"),)))


STEPS: Mapping[str, Callable[[_Machine, Attributes], None]] = {
    "bitwise": _Machine.bitwise,
    "byteorder": _Machine.byteorder,
    "ct": _Machine.ct,
    "fib": _Machine.fib,
    "immediate": _Machine.immediate,
    "lookup": _Machine.lookup,
    "masq": _Machine.masquerade,
    "match": _Machine.match,
    "meta": _Machine.meta,
    "nat": _Machine.translate,
    "notrack": _Machine.notrack,
    "objref": _Machine.object,
    "payload": _Machine.payload,
    "queue": _Machine.queue,
    "range": _Machine.range,
    "redir": _Machine.translate,
    "reject": _Machine.reject,
    "target": _Machine.target,
}
LOADERS = frozenset({"exthdr", "hash", "numgen", "osf", "rt", "socket", "tunnel", "xfrm"})
"""Expressions that load what is `other` to us."""


def _slot(register: int) -> int:
    """The first four bytes of a register: NFT_REG_1 … 4 have 16 bytes, NFT_REG32_00 … 15 have 4."""
    return (register - 1) * 4 if register < 8 else register - 8
