"""All rules of nf_tables, read from the kernel without a tool: nft's own and those of iptables-nft."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeAlias

from flanneld_py.drivers import nfmessages as nf
from flanneld_py.drivers.netlink import (
    DUMP_ATTEMPTS,
    Failure,
    NetlinkSocket,
    ProtocolMissing,
    Row,
    attributes,
)
from flanneld_py.drivers.nfdecode import Elements, Meaning, decode_expressions, split_counters, verdict_of
from flanneld_py.drivers.nfvalues import Span
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey, Rule, Verdict

WHAT = "the packet-filter rules"
NO_NF_TABLES = (errno.EINVAL, errno.EOPNOTSUPP)
"""What nfnetlink answers where the kernel has no nf_tables."""
Known: TypeAlias = Mapping[tuple[nf.Family, tuple[bytes, ...]], Meaning]
"""What expressions mean in the tables of a family."""
MOST_ELEMENTS = 2000
"""A set with more (a blocklist) is not taken apart, nor read again: 150,000 intervals take a second."""


class SetShape(NamedTuple):
    """What a set is."""

    flags: int
    key_length: int
    handle: int


@dataclass(slots=True)
class _Memory:
    """What a reading leaves for the next one."""

    meanings: Known = field(default_factory=dict)
    """Of the rules that were there: they need not be decoded again."""
    large: set[tuple[nf.Family, str, str, int]] = field(default_factory=set)
    """Sets with too many elements: family, table, name, handle."""


class Element(NamedTuple):
    """One element of a set as the kernel lists it: of an interval, where it begins, or ends."""

    key: int
    ends: bool
    verdict: Verdict


class NfReader:
    """Reads the tables of the families ip, ip6 and inet. Used by one thread at a time.

    Raises:
        KernelError: no netlink socket.
    """

    def __init__(self) -> None:
        self._socket: NetlinkSocket | None = None
        self._memory = _Memory()
        with suppress(ProtocolMissing):
            self._socket = NetlinkSocket(nf.NETLINK_NETFILTER)

    @property
    def port_id(self) -> int:
        """By which the kernel knows this socket; 0 where it has no netfilter."""
        return self._socket.port_id if self._socket else 0

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def generation(self) -> int:
        """The number that every change of any rule raises; 0 where the kernel has no nf_tables.

        Raises:
            KernelError: not permitted, or no answer.
        """
        if self._socket is None:
            return 0
        answer = self._socket.ask(nf.GETGEN, nf.body())
        if isinstance(answer, Failure):
            if answer.code in NO_NF_TABLES:
                return 0
            raise KernelError(f"cannot read {WHAT} from the kernel: {answer.reason}")
        return nf.number(_attributes(answer), nf.GEN_ID)

    def chains(self, tables: Collection[tuple[str, str]] | None = None) -> dict[ChainKey, Chain]:
        """The chains as they stood at one moment; none where the kernel has no nf_tables.

        Args:
            tables: family and name of those to read; None: all.

        Raises:
            KernelError: not permitted, no answer, or they kept changing.
        """
        for _ in range(DUMP_ATTEMPTS):
            before = self.generation()
            if self._socket is None or before == 0:
                return {}
            found = _Dump(self._socket, tables, self._memory).chains()
            if self.generation() == before:
                return found
        raise KernelError(f"cannot read {WHAT} from the kernel: they kept changing while being read")


class _Dump:
    """One reading of everything asked for."""

    def __init__(
        self, socket: NetlinkSocket, tables: Collection[tuple[str, str]] | None, memory: _Memory
    ) -> None:
        self._socket = socket
        self._tables = tables
        self._memory = memory
        self._shapes: dict[tuple[nf.Family, str], dict[str, SetShape]] = {}
        self._elements: dict[tuple[nf.Family, str, str], Elements | None] = {}

    def chains(self) -> dict[ChainKey, Chain]:
        dormant = {
            (family, nf.name(found, nf.TABLE_NAME))
            for family, found in self._rows(nf.GETTABLE, self._families())
            if nf.number(found, nf.TABLE_FLAGS) & nf.TABLE_DORMANT
        }
        rules = self._rules()
        chains: dict[ChainKey, Chain] = {}
        for family, found in self._rows(nf.GETCHAIN, self._families()):
            table = nf.name(found, nf.OBJECT_TABLE)
            if self._wanted(family, table):
                key = ChainKey("nft", family, table, nf.name(found, nf.CHAIN_NAME))
                chains[key] = _chain(found, rules.get(key, ()), hooked=(family, table) not in dormant)
        return chains

    def _wanted(self, family: str, table: str) -> bool:
        return self._tables is None or (family, table) in self._tables

    def _families(self) -> list[bytes]:
        """Requests for what the kernel does not filter by table."""
        if self._tables is None:
            return [nf.body()]
        families = {family for family, _ in self._tables}
        return [nf.body(nf.FAMILIES[name]) for name in nf.FAMILIES if name in families]

    def _rows(self, kind: int, requests: Iterable[bytes]) -> Iterator[tuple[nf.Family, Mapping[int, bytes]]]:
        for request in requests:
            for row in self._socket.dump(WHAT, kind, request, absent=(errno.ENOENT,)):
                family = nf.FAMILY_NAMES.get(row[0][row[1]])
                if family is not None:
                    yield family, _attributes(row)

    def _rules(self) -> dict[ChainKey, list[Rule]]:
        requests = [nf.body()]
        if self._tables is not None:
            requests = [
                nf.body(number, (nf.OBJECT_TABLE, table))
                for family, table in self._tables
                if (number := nf.FAMILIES.get(family)) is not None  # type: ignore[call-overload]
            ]
        rules: dict[ChainKey, list[Rule]] = {}
        meanings: dict[tuple[nf.Family, tuple[bytes, ...]], Meaning] = {}
        for family, found in self._rows(nf.GETRULE, requests):
            table = nf.name(found, nf.OBJECT_TABLE)
            key = ChainKey("nft", family, table, nf.name(found, nf.RULE_CHAIN))
            asked, packets = split_counters(found.get(nf.RULE_EXPRESSIONS, b""))
            meaning = self._memory.meanings.get((family, asked))
            if meaning is None:
                meaning = decode_expressions(family, asked, partial(self._elements_of, family, table))
            if meaning.lasting:
                meanings[family, asked] = meaning
            comment = meaning.comment or nf.comment_of(found.get(nf.RULE_USERDATA, b""))
            handle = nf.number(found, nf.RULE_HANDLE)
            rules.setdefault(key, []).extend(
                Rule(matches, verdict, comment, handle, packets, meaning.sets)
                for matches, verdict in meaning.ways
            )
        self._memory.meanings = meanings
        return rules

    # --- sets -------------------------------------------------------------------------------------

    def _elements_of(self, family: nf.Family, table: str, name: str) -> Elements | None:
        key = (family, table, name)
        if key not in self._elements:
            self._elements[key] = self._read_elements(family, table, name)
        return self._elements[key]

    def _read_elements(self, family: nf.Family, table: str, name: str) -> Elements | None:
        shape = self._sets(family, table).get(name)
        if shape is None or shape.flags & nf.SET_CONCAT:
            return None
        known = (family, table, name, shape.handle)
        if known in self._memory.large:
            return None
        request = nf.body(nf.FAMILIES[family], (nf.OBJECT_TABLE, table), (nf.ELEMENTS_SET, name))
        listed: list[Element] = []
        for _, found in self._rows(nf.GETSETELEM, [request]):
            for _, data in nf.listed(found.get(nf.ELEMENTS, b"")):
                if len(listed) == 2 * MOST_ELEMENTS:
                    self._memory.large.add(known)
                    return None
                element = dict(nf.listed(data))
                if nf.number(element, nf.ELEMENT_FLAGS) & nf.ELEMENT_CATCHALL:
                    return None
                listed.append(_element(element))
        spans = _intervals(listed, shape.key_length) if shape.flags & nf.SET_INTERVAL else _points(listed)
        is_map = bool(shape.flags & nf.SET_MAP)
        return Elements(shape.key_length, [span for span, _ in spans], [v for _, v in spans if is_map])

    def _sets(self, family: nf.Family, table: str) -> dict[str, SetShape]:
        if (family, table) not in self._shapes:
            request = nf.body(nf.FAMILIES[family], (nf.OBJECT_TABLE, table))
            self._shapes[family, table] = {
                nf.name(found, nf.SET_NAME): SetShape(
                    nf.number(found, nf.SET_FLAGS),
                    nf.number(found, nf.SET_KEY_LEN),
                    nf.number(found, nf.SET_HANDLE),
                )
                for _, found in self._rows(nf.GETSET, [request])
            }
        return self._shapes[family, table]


def _attributes(row: Row) -> dict[int, bytes]:
    datagram, start, end = row
    return attributes(datagram, start + nf.NFGENMSG.size, end)


def _chain(found: Mapping[int, bytes], rules: Iterable[Rule], *, hooked: bool) -> Chain:
    """A chain of a dormant table is as one that nobody jumps to."""
    if nf.CHAIN_HOOK not in found or not hooked:
        return Chain(tuple(rules))
    hook = dict(nf.listed(found[nf.CHAIN_HOOK]))
    number = nf.number(hook, nf.HOOK_NUMBER)
    return Chain(
        tuple(rules),
        nf.HOOKS[number] if number < len(nf.HOOKS) else "",
        nf.name(found, nf.CHAIN_TYPE),
        nf.signed(hook, nf.HOOK_PRIORITY),
        "accept" if nf.number(found, nf.CHAIN_POLICY) else "drop",
    )


def _element(found: Mapping[int, bytes]) -> Element:
    key = dict(nf.listed(found.get(nf.ELEMENT_KEY, b""))).get(nf.DATA_VALUE, b"")
    data = dict(nf.listed(found.get(nf.ELEMENT_DATA, b"")))
    return Element(
        int.from_bytes(key, "big"),
        bool(nf.number(found, nf.ELEMENT_FLAGS) & nf.ELEMENT_INTERVAL_END),
        verdict_of(data.get(nf.DATA_VERDICT, b"")),
    )


def _points(listed: Iterable[Element]) -> list[tuple[Span, Verdict]]:
    return [((element.key, element.key), element.verdict) for element in sorted(listed)]


def _intervals(listed: Iterable[Element], key_length: int) -> list[tuple[Span, Verdict]]:
    """An interval ends before the next element, whether that begins one or only ends this one."""
    found: list[tuple[Span, Verdict]] = []
    begun: Element | None = None
    for element in sorted(listed, key=lambda element: (element.key, not element.ends)):
        if begun is not None and element.key > begun.key:
            found.append(((begun.key, element.key - 1), begun.verdict))
        begun = None if element.ends else element
    if begun is not None:
        found.append(((begun.key, (1 << 8 * key_length) - 1), begun.verdict))
    return found
