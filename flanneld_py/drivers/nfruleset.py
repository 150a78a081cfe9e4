"""All rules of nf_tables, kept up to date: of what nobody has touched since, nothing is read again.

Somebody may add elements to a set of his own all the time. So a table counts as read when nothing was heard
of it while it was read, whatever became of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flanneld_py.drivers.nfmonitor import NfMonitor, Touched
from flanneld_py.drivers.nfreader import NfReader, TableName, kept_changing
from flanneld_py.packetfilter import Chain, ChainKey

PATIENCE = 1.0
"""Seconds for which tables are read again that others keep changing, from when all have been read once."""
NOTICE = 0.1
"""Seconds within which the kernel tells of a change that can be seen already."""
NOTICE_STEP = 0.005


class NfRuleset:
    """Reads and listens. One thread calls all but `interrupt`.

    Raises:
        KernelError: no netlink socket, or not permitted.
    """

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        """`between` is called again and again while thousands of rules are read."""
        self._monitor = NfMonitor()
        self._reader = NfReader(between)
        self._listening_since = self._reader.generation()
        self._tables: dict[tuple[str, str], dict[ChainKey, Chain]] = {}
        """Those of which nothing was heard since they were read."""

    def close(self) -> None:
        self._monitor.close()
        self._reader.close()

    def generation(self) -> int:
        """As NfReader."""
        return self._reader.generation()

    def wait(self, timeout: float) -> None:
        """Until somebody changes something, an `interrupt`, or for that many seconds.

        Raises:
            KernelError: the socket is of no more use.
        """
        self._note(self._monitor.wait(timeout))

    def interrupt(self) -> None:
        """Make a `wait` return."""
        self._monitor.interrupt()

    def chains(self) -> dict[ChainKey, Chain]:
        """All chains; each table as it stood at one moment.

        Raises:
            KernelError: not permitted, no answer, or a table kept changing.
        """
        patient_until = None
        while True:
            self._catch_up()
            there = self._reader.tables()
            self._tables = {name: chains for name, chains in self._tables.items() if name in there}
            missing = sorted(there - self._tables.keys())
            if not missing:
                return {key: chain for chains in self._tables.values() for key, chain in chains.items()}
            if patient_until is not None and time.monotonic() > patient_until:
                raise kept_changing()
            for name in missing:
                self._read(name)
            patient_until = patient_until or time.monotonic() + PATIENCE

    def _read(self, name: TableName) -> None:
        self._tables[name] = {}  # taken out again by what is heard of it
        found = self._reader.table(name)
        self._catch_up()
        if name in self._tables:
            self._tables[name] = found

    def _catch_up(self) -> None:
        """Hear of all that can be seen already."""
        seen, deadline = self._reader.generation(), time.monotonic() + NOTICE
        self._note(self._monitor.wait(0))
        while max(self._monitor.generation, self._listening_since) < seen and time.monotonic() < deadline:
            self._note(self._monitor.wait(NOTICE_STEP))

    def _note(self, touched: Touched | None) -> None:
        if touched is None:
            return
        if touched.overflow:
            self._tables.clear()
        for name in touched.tables:
            self._tables.pop(name, None)
