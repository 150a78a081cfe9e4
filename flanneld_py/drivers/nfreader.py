"""All rules of nf_tables, read from the kernel without a tool: nft's own and those of iptables-nft."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias

from msgspec import Struct, field

from flanneld_py.drivers import nfmessages as nf
from flanneld_py.drivers.netlink import (
    DUMP_ATTEMPTS,
    Failure,
    NetlinkSocket,
    ProtocolMissing,
    Row,
    attributes,
    understanding,
)
from flanneld_py.drivers.nfdecode import (
    REGISTER_SLOTS,
    Elements,
    Meaning,
    decode_expressions,
    split_counters,
    verdict_of,
)
from flanneld_py.drivers.nfvalues import Span
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey, Rule, Verdict

WHAT = "the packet-filter rules"
NO_NF_TABLES = (errno.EINVAL, errno.EOPNOTSUPP)
"""What nfnetlink answers where the kernel has no nf_tables."""
TableName: TypeAlias = tuple[nf.Family, str]
Known: TypeAlias = Mapping[tuple[bytes, ...], Meaning]
"""What expressions mean in a chain."""
ROWS_BETWEEN = 200
"""Rules after which who reads may look at something else."""
UNTOLD = nf.SET_CONCAT | nf.SET_TIMEOUT | nf.SET_DYNAMIC
"""Of sets that are not taken apart: keys of several registers, and elements that go while nobody is told."""
MOST_ELEMENTS = 2000
"""A set with more (a blocklist) is not taken apart, nor read again: 150,000 intervals take a second."""


class SetShape(NamedTuple):
    """What a set is."""

    flags: int
    key_length: int
    handle: int


class _Memory(Struct):
    """What a reading leaves for the next one."""

    meanings: dict[ChainKey, Known] = field(default_factory=dict)
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

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        """`between` is called again and again while thousands of rules are read."""
        self._between = between
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

    @understanding(WHAT)
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

    @understanding(WHAT)
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
            found = _Dump(self._socket, tables, self._memory, self._between).chains()
            if self.generation() == before:
                return found
        raise kept_changing()

    @understanding(WHAT)
    def tables(self) -> frozenset[TableName]:
        """The tables there are.

        Raises:
            KernelError: as for `chains`.
        """
        if self._socket is None or self.generation() == 0:
            return frozenset()
        return frozenset(_Dump(self._socket, None, self._memory, self._between).tables())

    @understanding(WHAT)
    def table(self, table: TableName) -> dict[ChainKey, Chain]:
        """The chains of one table, as they were if nobody has touched it since; the caller must know that.

        Raises:
            KernelError: as for `chains`.
        """
        if self._socket is None:
            return {}
        return _Dump(self._socket, (table,), self._memory, self._between, torn=True).chains()

    @understanding(WHAT)
    def some(self, keys: Collection[ChainKey]) -> dict[ChainKey, Chain]:
        """Those of these chains that are there: quickly, however many others there are.

        Each stands as it was at one moment, and all of them at the same one, unless somebody changes rules
        all the time.

        Raises:
            KernelError: as for `chains`.
        """
        found: dict[ChainKey, Chain] = {}
        for _ in range(DUMP_ATTEMPTS):
            before = self.generation()
            if self._socket is None or before == 0:
                return {}
            tables = tuple({(key.family, key.table) for key in keys})
            found = _Dump(self._socket, tables, self._memory, self._between).some(keys)
            if self.generation() == before:
                break
        return found


def kept_changing() -> KernelError:
    return KernelError(f"cannot read {WHAT} from the kernel: they kept changing while being read")


class _Dump:
    """One reading of everything asked for."""

    def __init__(
        self,
        socket: NetlinkSocket,
        tables: Collection[tuple[str, str]] | None,
        memory: _Memory,
        between: Callable[[], None],
        *,
        torn: bool = False,
    ) -> None:
        """`torn`: whether rules and sets may be listed although something changed meanwhile."""
        self._socket = socket
        self._tables = tables
        self._memory = memory
        self._between = between
        self._torn = torn
        self._shapes: dict[tuple[nf.Family, str], dict[str, SetShape]] = {}
        self._elements: dict[tuple[nf.Family, str, str], Elements | None] = {}

    def chains(self) -> dict[ChainKey, Chain]:
        awake = self.tables()
        rules = self._rules()
        chains: dict[ChainKey, Chain] = {}
        for family, found in self._rows(nf.GETCHAIN, self._families()):
            table = nf.name(found, nf.OBJECT_TABLE)
            if self._wanted(family, table):
                key = ChainKey("nft", family, table, nf.name(found, nf.CHAIN_NAME))
                chains[key] = _chain(found, rules.get(key, ()), hooked=awake.get((family, table), True))
        return chains

    def tables(self) -> dict[TableName, bool]:
        """Table → whether it is awake, and not dormant."""
        return {
            (family, nf.name(found, nf.TABLE_NAME)): not nf.number(found, nf.TABLE_FLAGS) & nf.TABLE_DORMANT
            for family, found in self._rows(nf.GETTABLE, self._families())
        }

    def some(self, keys: Collection[ChainKey]) -> dict[ChainKey, Chain]:
        chains: dict[ChainKey, Chain] = {}
        for (family, table), awake in self.tables().items():
            for key in keys:
                if key[:3] == ("nft", family, table) and (found := self._one(family, key, awake=awake)):
                    chains[key] = found
        return chains

    def _one(self, family: nf.Family, key: ChainKey, *, awake: bool) -> Chain | None:
        """None: there is no such chain."""
        number, table = nf.FAMILIES[family], (nf.OBJECT_TABLE, key.table)
        answer = self._socket.ask(nf.GETCHAIN, nf.body(number, table, (nf.CHAIN_NAME, key.chain)))
        if isinstance(answer, Failure):
            if answer.code == errno.ENOENT:
                return None
            raise KernelError(f"cannot read {WHAT} from the kernel: {answer.reason}")
        rules = self._rules([nf.body(number, table, (nf.RULE_CHAIN, key.chain))])
        return _chain(_attributes(answer), rules.get(key, ()), hooked=awake)

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
            torn = self._torn and kind not in (nf.GETTABLE, nf.GETCHAIN)  # those are not listed by table
            for row in self._socket.dump(WHAT, kind, request, absent=(errno.ENOENT,), torn=torn):
                family = nf.FAMILY_NAMES.get(row[0][row[1]])
                if family is not None:
                    yield family, _attributes(row)

    def _rules(self, requests: Sequence[bytes] = ()) -> dict[ChainKey, list[Rule]]:
        """`requests`: for all rules of the tables asked for, unless given."""
        rules: dict[ChainKey, list[Rule]] = {}
        meanings: dict[ChainKey, dict[tuple[bytes, ...], Meaning]] = {}
        for count, (family, found) in enumerate(self._rows(nf.GETRULE, requests or self._rule_requests())):
            if count % ROWS_BETWEEN == ROWS_BETWEEN - 1:
                self._between()
            table = nf.name(found, nf.OBJECT_TABLE)
            key = ChainKey("nft", family, table, nf.name(found, nf.RULE_CHAIN))
            asked, packets = split_counters(found.get(nf.RULE_EXPRESSIONS, b""))
            meaning = self._memory.meanings.get(key, {}).get(asked)
            if meaning is None:
                meaning = decode_expressions(family, asked, partial(self._elements_of, family, table))
            if meaning.lasting:
                meanings.setdefault(key, {})[asked] = meaning
            comment = meaning.comment or nf.comment_of(found.get(nf.RULE_USERDATA, b""))
            handle = nf.number(found, nf.RULE_HANDLE)
            rules.setdefault(key, []).extend(
                Rule(matches, verdict, comment, meaning.sets, handle, packets)
                for matches, verdict in meaning.ways
            )
        if not requests:
            kept = self._memory.meanings.items() if self._tables is not None else ()
            self._memory.meanings = {key: known for key, known in kept if not self._wanted(*key[1:3])}
        self._memory.meanings.update(meanings)
        return rules

    def _rule_requests(self) -> list[bytes]:
        if self._tables is None:
            return [nf.body()]
        return [
            nf.body(number, (nf.OBJECT_TABLE, table))
            for family, table in self._tables
            if (number := nf.FAMILIES.get(family)) is not None  # type: ignore[call-overload]
        ]

    # --- sets -------------------------------------------------------------------------------------

    def _elements_of(self, family: nf.Family, table: str, name: str) -> Elements | None:
        key = (family, table, name)
        if key not in self._elements:
            self._elements[key] = self._read_elements(family, table, name)
        return self._elements[key]

    def _read_elements(self, family: nf.Family, table: str, name: str) -> Elements | None:
        shape = self._sets(family, table).get(name)
        if shape is None or shape.flags & UNTOLD or shape.key_length > 4 * REGISTER_SLOTS:
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
    in_order = sorted(listed, key=lambda element: element.key)
    return [((element.key, element.key), element.verdict) for element in in_order]


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
