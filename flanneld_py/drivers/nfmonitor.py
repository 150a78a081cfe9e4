"""What the kernel says of its own accord about rules: a subscription to nf_tables' notifications.

It comes after every transaction, of nft, iptables-nft or anybody else, but not of legacy iptables.
"""

from __future__ import annotations

from contextlib import suppress

from msgspec import Struct, field

from flanneld_py.drivers import nfmessages as nf
from flanneld_py.drivers.netlink import UNREADABLE, ProtocolMissing, attributes, messages, open_socket
from flanneld_py.drivers.subscription import Subscription


class Touched(Struct, frozen=True):
    """What the notifications read by one `wait` amount to."""

    tables: frozenset[tuple[str, str]] = frozenset()
    """Family and name of the tables in which something changed."""
    overflow: bool = False
    """Notifications were lost: any table may have changed."""
    commands: frozenset[str] = frozenset()
    """Names of the processes that did it, as far as the kernel told."""


class _Pending(Struct):
    """A `Touched` in the making."""

    overflow: bool = False
    tables: set[tuple[str, str]] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)
    generation: int = 0


class NfMonitor(Subscription[Touched]):
    """Listens to the tables of the families ip, ip6 and inet.

    Where the kernel has no nf_tables, nothing is ever heard.

    Raises:
        KernelError: no netlink socket, or not permitted.
    """

    def __init__(self) -> None:
        sock = None
        with suppress(ProtocolMissing):
            sock = open_socket(nf.NETLINK_NETFILTER)
        super().__init__(sock, (nf.NFNLGRP_NFTABLES,))
        self.generation: int = 0
        """Of the last transaction heard of, whatever it touched; 0: of none yet."""

    def _drain(self) -> Touched | None:
        pending = _Pending()
        for datagram in self._datagrams():
            try:
                if datagram is None:
                    pending.overflow = True
                else:
                    _hear(pending, datagram)
            except UNREADABLE:
                pending.overflow = True  # it was about something, and does not say what
        self.generation = pending.generation or self.generation
        if not pending.tables and not pending.overflow:
            return None
        return Touched(frozenset(pending.tables), pending.overflow, frozenset(pending.commands))


def _hear(pending: _Pending, datagram: bytes) -> None:
    """A transaction's changes and, last, its number and author."""
    for kind, _, _, _, start, end in messages(datagram):
        if kind & 0xFF00 != nf.SUBSYSTEM:
            continue
        found = attributes(datagram, start + nf.NFGENMSG.size, end)
        if kind == nf.NEWGEN:
            pending.commands.add(nf.name(found, nf.GEN_PROC_NAME))
            pending.generation = nf.number(found, nf.GEN_ID)
        elif (family := nf.FAMILY_NAMES.get(datagram[start])) is not None:
            pending.tables.add((family, nf.name(found, nf.OBJECT_TABLE)))
