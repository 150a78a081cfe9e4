"""Whether etcd shows which interface carries the overlay: decided once, when the registry is known."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from msgspec import Struct

from flanneld_py.addresses import IPAddress
from flanneld_py.core.firstchoice import is_undisputed, prefers_registry
from flanneld_py.core.ifselect import address_of
from flanneld_py.daemon.inbox import Levels
from flanneld_py.model import HostFacts


def literal_addresses(endpoints: Sequence[str]) -> frozenset[IPAddress]:
    """Addresses of etcd, as far as its URLs name them."""
    return frozenset(ip for url in endpoints if (ip := address_of(_host(url))) is not None)


class Before(Struct, frozen=True):
    """What earlier runs left on this host."""

    subnet_file: bool = False
    mac: str = ""
    """Of the external interface then."""


class FirstChoice:
    """`towards` is an address of etcd once the interface that reaches it has been decided for."""

    def __init__(self, endpoints: Sequence[str], before: Before, *, is_asked: bool) -> None:
        """`endpoints`: URLs of etcd; `is_asked`: whether no flag names the interface."""
        hosts = [_host(url) for url in endpoints]
        self.literals = literal_addresses(endpoints)
        """Addresses of etcd, as far as they were given as such."""
        self.towards: IPAddress | None = None
        self.last: IPAddress | None = None
        """An address that this host had in the overlay, to go by until then."""
        self.is_decided = not is_asked
        self._before = before
        self._all_literal = all(address_of(host) is not None for host in hosts)
        self._in_use: IPAddress | None = None

    def ask(self, levels: Levels) -> frozenset[IPAddress]:
        """The addresses whose ways are to be known for `decide`."""
        if self.is_decided:
            return frozenset({self.towards} if self.towards is not None else ())
        if _is_known(levels) and levels.registry.endpoint is not None:
            self._in_use = _resolve(_host(levels.registry.endpoint))
        return self.literals | frozenset({self._in_use} if self._in_use is not None else ())

    def decide(self, facts: HostFacts, levels: Levels, node_id: str) -> None:
        """Decide, if that can be done by now; what was decided stays.

        Args:
            facts: the host, with the ways that `ask` named.
            levels: the same as `ask` had.
            node_id: of this host.
        """
        self.last = None
        if self.is_decided:
            return
        if self._all_literal and all(is_undisputed(facts, address) for address in self.literals):
            self.is_decided = True
        elif levels.snapshot is not None and _is_known(levels) and levels.registry.endpoint is not None:
            self.is_decided = True
            if self._in_use is not None and prefers_registry(
                facts,
                self._in_use,
                levels.snapshot,
                node_id=node_id,
                last_mac=self._before.mac,
                is_fresh=not self._before.subnet_file,
            ):
                self.towards = self._in_use
        elif levels.recalled is not None:
            self.last = next(iter(levels.recalled.own.record.public_ips.values()), None)


def _is_known(levels: Levels) -> bool:
    """Whether etcd has answered, so that a name of it can be resolved: without it that may take long."""
    return levels.snapshot is not None and levels.recalled is None


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _resolve(host: str) -> IPAddress | None:
    """One address of it; etcd has just been reached there, so its name is known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return ip_address(str(found[0][4][0]))
