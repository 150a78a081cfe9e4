"""Writing packet-filter rules: by their tools, one transaction for each table; deleting needs no tool."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from flanneld_py.core.rules import BUILTIN, Names
from flanneld_py.core.ruletext import Edit, iptables_script, nft_script
from flanneld_py.drivers import nfdelete
from flanneld_py.drivers.filtertools import LOCK_WAIT, ToolRuns, Tools
from flanneld_py.packetfilter import ChainKey, Chains


class RuleWriter:
    """Carries out edits. Used by one thread, but for `interrupt`."""

    def __init__(self, names: Names, tools: Tools, find: Callable[[], Tools]) -> None:
        """`find` looks for tools again, when one is missing: somebody may have followed our advice."""
        self._find = find
        self._names = names
        self._tools = tools
        self._runs = ToolRuns()
        self._chains: Chains = {}

    def interrupt(self) -> None:
        """End the tool that runs, and start no more: the process is about to end."""
        self._runs.interrupt()

    def write(self, edits: Sequence[Edit], chains: Chains) -> Mapping[ChainKey, str | None]:
        """Make these chains so; of each, why that was not done, or None.

        `chains`: all that stand in the tables concerned.
        """
        self._chains = chains
        self._runs.begin()
        errors: dict[ChainKey, str | None] = {}
        for write, group in groupby(sorted(edits, key=self._way), key=self._way):
            batch = list(group)
            error = self._writers[write[0]](batch)
            errors |= {edit.key: error for edit in batch}
        return errors

    def _way(self, edit: Edit) -> tuple[str, str, str]:
        """How an edit is written: those of equal ways go into one transaction."""
        key = edit.key
        if key.where == "legacy":
            return "legacy", key.family, key.table
        if edit.gone:
            return "delete", key.family, key.table
        if self._names.is_own_table(key):
            return "nft", "", ""
        by_iptables = ("nft", key.family) in self._tools.restore and key.table in BUILTIN
        return ("iptables" if by_iptables else "nft"), key.family, key.table

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
            self._tools = self._find()
        if not self._tools.nft:
            return "nft is not installed; install nftables, which is noticed by itself"
        return self._runs.run([self._tools.nft, "-f", "-"], nft_script(edits, self._adrift(edits)))

    def _adrift(self, edits: Sequence[Edit]) -> list[tuple[str, str]]:
        """Our tables that only making them anew puts right.

        A dormant one takes no chain that hangs anywhere; and a chain that hangs nowhere may be jumped to.
        """
        own = [edit for edit in edits if self._names.is_own_table(edit.key)]
        hooked = {key[:3] for key, chain in self._chains.items() if chain.hook}
        return sorted(
            {
                (edit.key.family, edit.key.table)
                for edit in own
                if edit.key[:3] not in hooked or (edit.old is not None and not edit.old.hook)
            }
        )

    def _restore(self, edits: Sequence[Edit]) -> str | None:
        key = edits[0].key
        if (key.where, key.family) not in self._tools.restore:
            self._tools = self._find()
        tool = self._tools.restore.get((key.where, key.family))
        if tool is None:
            name = "iptables" if key.family == "ip" else "ip6tables"
            return (
                f"{name}-{key.where}-restore is not installed; install iptables, which is noticed by itself"
            )
        return self._runs.run([tool, "-w", str(LOCK_WAIT), "--noflush"], iptables_script(key.table, edits))

    # --- deleting from nf_tables ------------------------------------------------------------------

    def _delete(self, edits: Sequence[Edit]) -> str | None:
        """In one table. What cannot go because something else there refers to it is emptied at least."""
        key = edits[0].key
        if not self._names.is_own_table(key):
            requests, chains = _emptying(edits), _deleting(edits)
            refused = nfdelete.commit([*requests, *chains])
            if refused is not None and refused.code == errno.EBUSY:
                emptied = nfdelete.commit(requests)
                return (emptied or refused).reason
            return refused.reason if refused else None
        there = {other for other in self._chains if other[:3] == key[:3]}
        refused = None
        if there - {edit.key for edit in edits}:
            refused = nfdelete.commit([*_emptying(edits), *_deleting(edits)])
            if refused is None or refused.code != errno.EBUSY:
                return refused.reason if refused else None
        # What somebody else made in our table goes as well; what of ours goes with it is put back at once.
        refused = nfdelete.commit([nfdelete.delete_table(key)])
        return refused.reason if refused else None


def _emptying(edits: Sequence[Edit]) -> list[bytes]:
    requests: list[bytes] = []
    for edit in edits:
        if edit.whole:
            requests.append(nfdelete.flush_chain(edit.key))
        elif edit.old is not None:
            requests += [nfdelete.delete_rule(edit.key, rule.handle) for rule in edit.old.rules]
    return requests


def _deleting(edits: Sequence[Edit]) -> list[bytes]:
    return [nfdelete.delete_chain(edit.key) for edit in edits if edit.whole and not edit.referred]
