"""Carrying out a plan: each table's ops in one batch to its driver, failures row by row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from msgspec.structs import replace

from flanneld_py.core.describe import WAITS, describe_key
from flanneld_py.core.plan import SET_TOGETHER, lost_devices, referents, replaces, rows_on, still_needed
from flanneld_py.drivers.base import Driver
from flanneld_py.errors import KernelError
from flanneld_py.model import Op, Outcome, Scope, State, Table, Verb


class Executor:
    """All drivers as one. Used by one thread only."""

    def __init__(self, drivers: Iterable[Driver]) -> None:
        self._drivers = tuple(drivers)
        self._driver_of: dict[Table, Driver] = {
            table: driver for driver in self._drivers for table in driver.tables
        }
        self._standing: frozenset[str] = frozenset()
        """The devices that were up when we looked last."""
        self.unread: dict[Table, str] = {}
        """Tables that could not be read last → why: nothing may be done about them."""

    def observe(self, scope: Scope, apart: Collection[Table] = ()) -> State:
        """What is ours, in all tables.

        `apart`: tables that may stay `unread` and empty, so that they hold up nothing else.

        Raises:
            KernelError: another table could not be read.
        """
        state = State()
        self.unread = {}
        for driver in self._drivers:
            try:
                seen = driver.observe(scope)
            except KernelError as error:
                if not set(driver.tables) <= set(apart):
                    raise
                self.unread |= dict.fromkeys(driver.tables, str(error))
                continue
            state = replace(state, **{table: seen.table(table) for table in driver.tables})
        self._standing = frozenset(name for name, link in state.links.items() if link.up)
        return state

    def is_standing(self, table: Table, key: object) -> bool:
        """Whether it is a device that was up when we looked last, and so carries rows as it is."""
        return table == "links" and key in self._standing

    def apply(self, ops: Sequence[Op], want: State, have: State, held: Iterable[Op] = ()) -> list[Outcome]:
        """Carry out `ops`; one outcome each, in order.

        An op is not tried whose referent has failed or is itself among those `held` back, nor a delete that
        would take the ground from under a row of `have` whose replacement has failed. A device that is up but
        could not be changed still carries rows. One that had to be deleted for another that then could not be
        made is put back.
        """
        held = list(held)
        standing = {("links", name) for name in self._standing - lost_devices((*ops, *held), have)}
        outcomes: list[Outcome] = []
        failed: dict[tuple[Table, object], str] = {
            (op.table, op.key): "failed before, is tried again later"
            for op in held
            if op.verb == "set" and (op.table, op.key) not in standing
        }
        for verb, table, batch in self._batches(ops):
            waits = _waiting(batch, want, have, failed) if failed else {}
            done = self._try(table, batch, waits)
            outcomes += done
            failures = [(op, error) for op, error in done if error is not None]
            for op, error in failures if verb == "set" else ():
                if (op.table, op.key) not in standing:
                    failed[op.table, op.key] = error
            if (verb, table) == ("set", "links"):
                outcomes = self._put_back(outcomes, have)
        return outcomes

    def _batches(self, ops: Iterable[Op]) -> list[tuple[Verb, Table, list[Op]]]:
        """Verb, first table and ops of what is given to a driver at once, in order."""
        batches: list[tuple[Verb, Table, list[Op]]] = []
        for (verb, table), run in groupby(ops, key=itemgetter(0, 1)):
            if batches and self._go_together(batches[-1], verb, table):
                batches[-1][2].extend(run)
            else:
                batches.append((verb, table, list(run)))
        return batches

    def _go_together(self, batch: tuple[Verb, Table, list[Op]], verb: Verb, table: Table) -> bool:
        before = batch[1]
        return (
            verb == batch[0] == "set"
            and {before, table} <= SET_TOGETHER
            and self._driver_of[before] is self._driver_of[table]
        )

    def _try(self, table: Table, batch: Sequence[Op], waits: Mapping[object, str]) -> Sequence[Outcome]:
        """Carry out those that need not wait."""
        if not waits:
            return self._driver_of[table].apply(batch)
        ready = [op for op in batch if op.key not in waits]
        done = iter(self._driver_of[table].apply(ready) if ready else ())
        return [Outcome(op, waits[op.key]) if op.key in waits else next(done) for op in batch]

    def _put_back(self, outcomes: Sequence[Outcome], have: State) -> list[Outcome]:
        """`outcomes` of links, those of deletes that were in vain as failures."""
        unmade = [(op, error) for op, error in outcomes if op.verb == "set" and error is not None]
        in_vain: dict[str, str] = {}
        for done, refused in outcomes:
            if done.verb == "del" and refused is None and done.key in have.links:
                for op, error in unmade:
                    if replaces(op.key, op.value, done.key, have):
                        in_vain[done.key] = f"was put back, as {describe_key(op.table, op.key)}: {error}"
        for table, run in groupby(rows_on(have, in_vain), key=lambda op: op.table):
            self._driver_of[table].apply(list(run))
        return [
            Outcome(op, in_vain.get(op.key)) if op.verb == "del" and error is None else Outcome(op, error)
            for op, error in outcomes
        ]


def _waiting(
    batch: Sequence[Op], want: State, have: State, failed: Mapping[tuple[Table, object], str]
) -> dict[object, str]:
    """Key of each op that must wait → why."""
    needed = still_needed(want, have, failed) if batch[0].verb == "del" else set()
    waits = {op.key: reason for op in batch if (reason := _waits(op, want, failed))}
    waits |= {op.key: f"{WAITS}what shall replace it" for op in batch if (op.table, op.key) in needed}
    return waits


def _waits(op: Op, want: State, failed: Mapping[tuple[Table, object], str]) -> str | None:
    for referent in referents(op, want):
        if referent in failed:
            return f"{WAITS}{describe_key(*referent)}: {failed[referent]}"
    return None
