"""Warnings about records that are left out: each once while it is, and never a flood of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flanneld_py.core.records import shortened
from flanneld_py.daemon.inbox import boottime

SHOWN, PERIOD = 100, 60.0
"""Records told one by one in so many seconds; of further ones the number has to do."""


class LeftOut:
    """Of one kind: those that cannot be read, or those that would harm others."""

    def __init__(self, log: Any, event: str, rest: str) -> None:
        """`event` and `rest`: of the lines in the log for one record, and for the number of further ones."""
        self._log = log
        self._event = event
        self._rest = rest
        self._known: set[str] = set()
        self._shown = self._untold = 0
        self._began = self._counted_at = -PERIOD

    def tell(self, reasons: Mapping[str, str], kept: Collection[str] | None = None) -> None:
        """What is left out now, by key.

        Whoever has a bad record written with a new fault each time does not get a line each time.

        Args:
            reasons: key → why, of all that are left out.
            kept: the keys whose last good record stays in force; None: says nothing of that.
        """
        news = [key for key in reasons if key not in self._known]
        self._known = set(reasons)
        if news and boottime() >= self._began + PERIOD:
            self._began, self._shown = boottime(), 0
        shown = news[: SHOWN - self._shown]
        for key in shown:
            more = {} if kept is None else {"kept": key in kept}
            self._log.warning(self._event, key=shortened(key), reason=shortened(reasons[key]), **more)
        self._shown += len(shown)
        self._untold += len(news) - len(shown)
        self.tell_rest()

    def tell_rest(self) -> None:
        """How many have not been shown: at once, then not again for a while."""
        if self._untold and boottime() >= self._counted_at + PERIOD:
            self._log.warning(self._rest, count=self._untold, see="flannelctl leases")
            self._untold, self._counted_at = 0, boottime()
