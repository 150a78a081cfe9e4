"""Carrying out a plan: each table's ops in one batch to its driver, failures row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from flanneld_py.core.plan import referents
from flanneld_py.drivers.base import Driver
from flanneld_py.model import Op, Outcome, Scope, State, Table


class Executor:
    """All drivers as one. Used by one thread only."""

    def __init__(self, drivers: Iterable[Driver]) -> None:
        self._drivers = tuple(drivers)
        self._driver_of: dict[Table, Driver] = {
            table: driver for driver in self._drivers for table in driver.tables
        }

    def observe(self, scope: Scope) -> State:
        """What is ours, in all tables.

        Raises:
            KernelError: a table could not be read.
        """
        state = State()
        for driver in self._drivers:
            seen = driver.observe(scope)
            state = replace(state, **{table: seen.table(table) for table in driver.tables})
        return state

    def apply(self, ops: Sequence[Op], want: State) -> list[Outcome]:
        """One outcome per op, in order. An op whose referent has just failed is not tried."""
        outcomes: list[Outcome] = []
        failed: dict[tuple[Table, object], str] = {}
        for (_, table), run in groupby(ops, key=lambda op: (op.verb, op.table)):
            batch = list(run)
            waits = {op.key: reason for op in batch if (reason := _waits(op, want, failed))} if failed else {}
            ready = [op for op in batch if op.key not in waits]
            done = iter(self._driver_of[table].apply(ready) if ready else ())
            for op in batch:
                if op.key in waits:
                    outcomes.append(Outcome(op, waits[op.key]))
                    continue
                outcome = next(done)
                outcomes.append(outcome)
                if outcome.error is not None and op.verb == "set":
                    failed[table, op.key] = outcome.error
        return outcomes


def _waits(op: Op, want: State, failed: Mapping[tuple[Table, object], str]) -> str | None:
    for referent in referents(op, want):
        if referent in failed:
            return f"waits for {referent[0]} {referent[1]}: {failed[referent]}"
    return None
