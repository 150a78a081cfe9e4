"""The state file: what the next run is told of our lease."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog
from msgspec.structs import replace

from flanneld_py.addresses import IPNetwork
from flanneld_py.core.statefile import SavedState, render_state
from flanneld_py.daemon.leaseground import Ground
from flanneld_py.drivers.files import write_atomically
from flanneld_py.model import Record


class LeaseFile:
    """Written when something in it changes, and only then. Any thread may call."""

    def __init__(
        self,
        path: Path,
        last: SavedState,
        earlier: tuple[IPNetwork, ...] = (),
        is_clean: Callable[[], bool] = lambda: False,
    ) -> None:
        """`last`: what the file is to say before a lease is held.

        `earlier`: Networks of earlier runs, kept until `is_clean`: what had to go from them is gone. A
        process that is killed before that has already replaced subnet.env, which named them as well.
        """
        self._path = path
        self._state = last
        self._earlier = earlier
        self._networks: tuple[IPNetwork, ...] = ()
        """Those of this run, in which something may have been made."""
        self._is_clean = is_clean
        self._saved = ""
        self._owed: SavedState | None = None
        """What could not be written."""
        self._lock = threading.Lock()
        self._log = structlog.get_logger().bind(part="lease")

    def remember(self, networks: Iterable[IPNetwork]) -> None:
        """Note these Networks, before the first row is made in one of them."""
        with self._lock:
            self._add(networks)
            if not set(self._networks) <= {*self._state.networks}:
                self._write(replace(self._state, networks=self._all()))

    def save(self, record: Record, ground: Ground, put_due: float) -> None:
        """A disk that is full costs the file, not the lease."""
        with self._lock:
            if self._earlier and self._is_clean():
                self._earlier = ()
            self._add((*ground.network.config.networks, *ground.network.former))
            state = SavedState(
                prefix=ground.host.prefix,
                node_id=ground.host.node_id,
                networks=self._all(),
                subnets=record.subnets,
                etcd_lease=record.etcd_lease,
                mac=ground.host.external.mac,
                mac_seed=ground.host.mac_seed,
                put_due=put_due,
            )
            self._write(state)

    def write_owed(self) -> None:
        """Try again what could not be written."""
        with self._lock:
            if self._owed is not None:
                self._write(self._owed)

    def _add(self, networks: Iterable[IPNetwork]) -> None:
        self._networks = tuple(dict.fromkeys((*networks, *self._networks)))

    def _all(self) -> tuple[IPNetwork, ...]:
        return tuple(dict.fromkeys((*self._networks, *self._earlier)))

    def _write(self, state: SavedState) -> None:
        text = render_state(state)
        if text == self._saved:
            return
        try:
            write_atomically(self._path, text)
            self._saved, self._state, self._owed = text, state, None
        except OSError as error:
            if self._owed is None:
                self._log.warning("state_not_saved", path=str(self._path), error=str(error))
            self._owed = state
