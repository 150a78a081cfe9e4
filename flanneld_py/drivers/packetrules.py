"""Packet-filter rules as a table: read in-process, compared, and written by `rulewriter`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from flanneld_py.addresses import IPNetwork
from flanneld_py.core.rules import Names, others, own_rows, referrers, tell_referrers
from flanneld_py.core.ruletext import Edit
from flanneld_py.drivers.filtertools import Tools, find_tools
from flanneld_py.drivers.nfreader import WHAT, NfReader
from flanneld_py.drivers.nfruleset import NfRuleset
from flanneld_py.drivers.rulewriter import RuleWriter
from flanneld_py.drivers.xtables import LegacyTables
from flanneld_py.errors import KernelError
from flanneld_py.model import Op, Outcome, Scope, State, Table
from flanneld_py.packetfilter import Chain, ChainKey, Chains


class PacketRules:
    """Driver of the table rules."""

    tables: tuple[Table, ...] = ("rules",)

    def __init__(
        self,
        names: Names,
        tools: Tools,
        places: Callable[[], frozenset[ChainKey] | None] | None = None,
        find: Callable[[], Tools] = find_tools,
    ) -> None:
        """`places`: all chains in which something of ours may be, as far as that is known.

        Who follows all rules anyway knows them, so here only those need to be read; without, all are.
        `find` looks for tools again.
        """
        self._names = names
        self._writer = RuleWriter(names, tools, find)
        self._nft = NfReader()
        self._legacy = LegacyTables()
        self._places = places
        self._written: set[ChainKey] = set()
        self._last: object = None
        self._chains: Chains = {}
        self._own: dict[ChainKey, Chain] = {}
        self._others: dict[ChainKey, tuple[IPNetwork, ...]] = {}

    def interrupt(self) -> None:
        """For another thread: end a tool that runs, and start no more."""
        self._writer.interrupt()

    def close(self) -> None:
        self._nft.close()
        self._legacy.close()

    def observe(self, scope: Scope) -> State:
        places = self._places() if self._places else frozenset()
        if places is None:
            raise KernelError(f"{WHAT} could not be read yet")
        if self._places:
            keys = places | self._written
            self._chains = {**self._nft.some(keys), **self._legacy.some(keys)}
        elif (now := (self._nft.generation(), self._legacy.fingerprint())) != self._last:
            with closing(NfRuleset()) as nft:
                self._chains = {**nft.chains(), **self._legacy.chains()}
            self._last = now
        self._own = own_rows(self._chains, self._names, scope.networks)
        self._others = dict(others(self._chains, self._names, scope.networks))
        return State(rules=self._own)

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        self._last = None
        self._written |= {op.key for op in ops}
        errors: dict[ChainKey, str | None] = {}
        edits = []
        for op in ops:
            errors[op.key] = self._refusal(op.key)
            if errors[op.key] is None:
                edits.append(self._edit(op))
        errors |= self._writer.write(edits, self._chains)
        return [Outcome(op, errors[op.key]) for op in ops]

    def _edit(self, op: Op) -> Edit:
        key = op.key
        new = op.value if op.verb == "set" else Chain()
        whole, gone = self._names.own_chain(key), op.verb == "del"
        referred = gone and whole and bool(referrers(key, self._chains, self._names))
        return Edit(key, new, self._own.get(key), whole, gone, referred)

    def left_to_others(self) -> list[str]:
        """For people: of our chains those that others lead to, which so cannot go, as of the last look."""
        named = (key for key in self._chains if self._names.own_chain(key) and key not in self._others)
        found = {key: referrers(key, self._chains, self._names) for key in named}
        return [tell_referrers(key, rules) for key, rules in found.items() if rules]

    def _refusal(self, key: ChainKey) -> str | None:
        other = self._others.get(key)
        if other is None and self._names.is_own_table(key):
            other = next((nets for there, nets in self._others.items() if there[:3] == key[:3]), None)
        if other is None:
            return None
        nets = " ".join(map(str, other))
        return (
            f"{key} is there and speaks of {nets}, so it belongs to another flannel; "
            "stop that, or start this one with another --etcd-prefix"
        )
