"""The tables of legacy iptables, read in-process: the kernel sends no events for them (x_tables.h).

What iptables-nft writes is in nf_tables and not to be seen here.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from flanneld_py.drivers.xtdecode import (
    INFO,
    Family,
    TableInfo,
    decode_table,
    read_info,
    without_counters,
)
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey

PROC_NET = Path("/proc/thread-self/net")
"""Of the thread's own network namespace."""
SO_GET_INFO, SO_GET_ENTRIES = 64, 65
"""IPT_SO_GET_INFO and so on; of IPv6 the same (linux/netfilter_ipv6/ip6_tables.h)."""
GET_ENTRIES = struct.Struct("@32sI0Q")
"""struct ipt_get_entries without the entries: name, their size."""
MOST_TRIES = 20
"""A table that changes between two questions is asked for again."""


class _Kind(NamedTuple):
    family: Family
    tool: str
    names: str
    """The file that lists the tables there are: asking for another one would create it."""
    domain: socket.AddressFamily
    level: int


KINDS = (
    _Kind("ip", "iptables", "ip_tables_names", socket.AF_INET, socket.IPPROTO_IP),
    _Kind("ip6", "ip6tables", "ip6_tables_names", socket.AF_INET6, socket.IPPROTO_IPV6),
)


class LegacyTables:
    """Reads the legacy tables of this thread's network namespace. Creates none, changes nothing."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._sockets: dict[str, socket.socket] = {}
        self._listed: dict[Family, list[str] | None] = {}
        """Tables at the last look; None: the kernel has no legacy iptables of this family."""
        self._digests: dict[tuple[Family, str], tuple[bytes, bytes]] = {}
        """Table → its entries as they were last, and a digest of them without their counters."""
        self._decoded: dict[tuple[Family, str], tuple[bytes, dict[ChainKey, Chain]]] = {}
        """Table → its entries as they were last, and the chains they make."""

    def close(self) -> None:
        while self._sockets:
            self._sockets.popitem()[1].close()

    @property
    def is_there(self) -> bool:
        """Whether this kernel had them at all at the last look; then somebody may use them at any time."""
        return any(names is not None for names in self._listed.values())

    @property
    def is_in_use(self) -> bool:
        """Whether there was a table at the last look."""
        return any(self._listed.values())

    def chains(self) -> dict[ChainKey, Chain]:
        """All chains of the tables that are in use, of both families; empty where there is no iptables.

        Raises:
            KernelError: they could not be read; nothing may be concluded about them.
        """
        decoded: dict[tuple[Family, str], tuple[bytes, dict[ChainKey, Chain]]] = {}
        for family, table, info, entries in self._tables():
            known, chains = self._decoded.get((family, table), (b"", {}))
            if entries != known:
                chains = decode_table(family, table, info, entries)
            decoded[family, table] = entries, chains
        self._decoded = decoded
        return {key: chain for _, chains in decoded.values() for key, chain in chains.items()}

    def some(self, keys: Iterable[ChainKey]) -> dict[ChainKey, Chain]:
        """Those of these chains that are there: quickly, however many others there are.

        Raises:
            KernelError: as for `chains`.
        """
        names: dict[tuple[str, str], set[str]] = {}
        for key in keys:
            if key.where == "legacy":
                names.setdefault((key.family, key.table), set()).add(key.chain)
        return {
            key: chain
            for family, table, info, entries in self._tables()
            if (family, table) in names
            for key, chain in decode_table(family, table, info, entries, names[family, table]).items()
        }

    def fingerprint(self) -> bytes:
        """Another one when a rule or policy has changed, the same when only counters have.

        Raises:
            KernelError: as for `chains`.
        """
        digest = hashlib.blake2b(digest_size=16)
        for family, table, info, entries in self._tables():
            digest.update(f"{family} {table}".encode())
            digest.update(self._digest(family, table, info, entries))
        return digest.digest()

    def _digest(self, family: Family, table: str, info: TableInfo, entries: bytes) -> bytes:
        last, digest = self._digests.get((family, table), (b"", b""))
        if entries != last or not digest:
            whole = repr(info).encode() + without_counters(family, entries)
            digest = hashlib.blake2b(whole, digest_size=16).digest()
            self._digests[family, table] = entries, digest
        return digest

    def _tables(self) -> Iterator[tuple[Family, str, TableInfo, bytes]]:
        for kind in KINDS:
            try:
                names = self._listed[kind.family] = _table_names(kind)
                for name in names or ():
                    if (table := self._read(kind, name)) is not None:
                        yield kind.family, name, *table
            except OSError as error:
                remedy = "; CAP_NET_ADMIN is needed" if error.errno in (errno.EPERM, errno.EACCES) else ""
                raise KernelError(f"{_cannot(kind)}: {error.strerror}{remedy}") from error

    def _read(self, kind: _Kind, name: str) -> tuple[TableInfo, bytes] | None:
        """None: the table has gone in the meantime."""
        for _ in range(MOST_TRIES):
            try:
                info = read_info(self._ask(kind, SO_GET_INFO, os.fsencode(name), INFO.size))
                head = GET_ENTRIES.pack(os.fsencode(name), info.size)
                answer = self._ask(kind, SO_GET_ENTRIES, head, GET_ENTRIES.size + info.size)
                return info, answer[GET_ENTRIES.size :]
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return None
                if error.errno != errno.EAGAIN:  # what it is when the size has changed
                    raise
        raise KernelError(f"{_cannot(kind)}: table {name} changes all the time")

    def _ask(self, kind: _Kind, option: int, question: bytes, size: int) -> bytes:
        """getsockopt(2); that of Python's socket module takes no question and at most 1024 bytes."""
        answer = ctypes.create_string_buffer(question, size)
        length = ctypes.c_uint(size)
        if self._libc.getsockopt(self._socket(kind), kind.level, option, answer, ctypes.byref(length)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return answer.raw[: length.value]

    def _socket(self, kind: _Kind) -> int:
        """Any socket of the family will do; this sort needs no CAP_NET_RAW."""
        if kind.family not in self._sockets:
            flags = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
            self._sockets[kind.family] = socket.socket(kind.domain, flags)
        return self._sockets[kind.family].fileno()


def _cannot(kind: _Kind) -> str:
    return f"cannot read the rules of legacy {kind.tool}"


def _table_names(kind: _Kind) -> list[str] | None:
    """Sorted; empty when nobody has used it, None when the kernel has no legacy iptables of this family."""
    try:
        return sorted((PROC_NET / kind.names).read_text(encoding="ascii").split())
    except FileNotFoundError:
        return None
