"""What every driver of kernel tables or files is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from flanneld_py.model import Op, Outcome, Scope, State, Table


class Driver(Protocol):
    """Sole reader and writer of its tables. Not thread-safe: the reconciler alone calls it."""

    tables: tuple[Table, ...]

    def observe(self, scope: Scope) -> State:
        """What is ours, in our tables; the others are left empty.

        Raises:
            KernelError: nothing could be read; the caller keeps what it knew.
        """

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        """Carry out ops of one verb and one table, or of several that need nothing of each other.

        One outcome each, in order. Never raises for a row.

        Raises:
            Unsupported: this kernel has no such thing as these rows.
        """
