"""Packet-filter rules: read in-process, written by their tools in one transaction for each table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from flanneld_py.core.rules import BUILTIN, Names, others, own_rows
from flanneld_py.core.ruletext import Edit, iptables_script, nft_script
from flanneld_py.drivers import nfdelete
from flanneld_py.drivers.filtertools import LOCK_WAIT, Tools, run_script
from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.drivers.xtables import LegacyTables
from flanneld_py.model import IPNetwork, Op, Outcome, Scope, State, Table
from flanneld_py.packetfilter import Chain, ChainKey, Chains


class PacketRules:
    """Driver of the table rules."""

    tables: tuple[Table, ...] = ("rules",)

    def __init__(self, names: Names, tools: Tools) -> None:
        self._names = names
        self._tools = tools
        self._nft = NfReader()
        self._legacy = LegacyTables()
        self._tables: set[tuple[str, str]] | None = None
        """nf_tables' that may hold something of ours; None: not known yet, so all are read."""
        self._last: tuple[int, bytes] | None = None
        self._chains: Chains = {}
        self._own: dict[ChainKey, Chain] = {}
        self._others: dict[ChainKey, tuple[IPNetwork, ...]] = {}

    def close(self) -> None:
        self._nft.close()
        self._legacy.close()

    def observe(self, scope: Scope) -> State:
        now = (self._nft.generation(), self._legacy.fingerprint())
        if now != self._last:
            self._chains = {**self._nft.chains(self._tables), **self._legacy.chains()}
            self._last = now
        self._own = own_rows(self._chains, self._names, scope.networks)
        self._note_tables(self._own)
        self._others = dict(others(self._chains, self._names, scope.networks))
        return State(rules=self._own)

    def _note_tables(self, keys: Iterable[ChainKey]) -> None:
        if self._tables is None:
            self._tables = {
                *zip(("ip", "ip6"), self._names.tables, strict=True),
                *((family, table) for family in ("ip", "ip6") for table in BUILTIN),
            }
        self._tables |= {(key.family, key.table) for key in keys if key.where == "nft"}

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        self._last = None
        self._note_tables(op.key for op in ops)
        errors: dict[ChainKey, str | None] = {}
        edits = []
        for op in ops:
            errors[op.key] = self._refusal(op.key)
            if errors[op.key] is None:
                edits.append(self._edit(op))
        for write, group in groupby(sorted(edits, key=self._way), key=self._way):
            batch = list(group)
            error = self._writers[write[0]](batch)
            errors |= {edit.key: error for edit in batch}
        return [Outcome(op, errors[op.key]) for op in ops]

    def _edit(self, op: Op) -> Edit:
        key = op.key
        new = op.value if op.verb == "set" else Chain()
        return Edit(key, new, self._own.get(key), self._names.own_chain(key), gone=op.verb == "del")

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

    # --- writing ----------------------------------------------------------------------------------

    def _way(self, edit: Edit) -> tuple[str, str, str]:
        """How an edit is written: those of equal ways go into one transaction."""
        key = edit.key
        if key.where == "legacy":
            return "legacy", key.family, key.table
        if edit.gone:
            return "delete", "", ""
        by_iptables = not self._names.is_own_table(key) and ("nft", key.family) in self._tools.restore
        return ("iptables", key.family, key.table) if by_iptables else ("nft", "", "")

    @property
    def _writers(self) -> dict[str, Callable[[Sequence[Edit]], str | None]]:
        return {
            "legacy": self._restore,
            "iptables": self._restore,
            "nft": self._write_by_nft,
            "delete": self._delete,
        }

    def _write_by_nft(self, edits: Sequence[Edit]) -> str | None:
        if not self._tools.nft:
            return "nft is not installed; install nftables, then restart the daemon"
        return run_script([self._tools.nft, "-f", "-"], nft_script(edits))

    def _restore(self, edits: Sequence[Edit]) -> str | None:
        key = edits[0].key
        tool = self._tools.restore.get((key.where, key.family))
        if tool is None:
            name = "iptables" if key.family == "ip" else "ip6tables"
            return f"{name}-{key.where}-restore is not installed; install iptables, then restart the daemon"
        return run_script([tool, "-w", str(LOCK_WAIT), "--noflush"], iptables_script(key.table, edits))

    def _delete(self, edits: Sequence[Edit]) -> str | None:
        keys = {edit.key for edit in edits}
        tables = {key[:3]: key for key in keys if self._names.is_own_table(key)}
        emptied = {
            table: key
            for table, key in tables.items()
            if all(there in keys for there in self._chains if there[:3] == table)
        }
        requests = [nfdelete.delete_table(key) for key in emptied.values()]
        left = [edit for edit in edits if edit.key[:3] not in emptied]
        for edit in left:
            if edit.whole:
                requests.append(nfdelete.flush_chain(edit.key))
            elif edit.old is not None:
                requests += [nfdelete.delete_rule(edit.key, rule.handle) for rule in edit.old.rules]
        requests += [nfdelete.delete_chain(edit.key) for edit in left if edit.whole]
        refused = nfdelete.commit(requests)
        return refused.reason if refused else None
