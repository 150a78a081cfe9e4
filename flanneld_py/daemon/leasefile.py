"""The state file: what the next run is told of our lease."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from flanneld_py.core.statefile import SavedState, render_state
from flanneld_py.daemon.leaseground import Ground
from flanneld_py.drivers.files import write_atomically
from flanneld_py.model import IPNetwork, Record


class LeaseFile:
    """Written when something in it changes, and only then."""

    def __init__(
        self, path: Path, earlier: tuple[IPNetwork, ...] = (), is_clean: Callable[[], bool] = lambda: False
    ) -> None:
        """`earlier`: Networks of earlier runs, kept until `is_clean`: what had to go from them is gone.

        A process that is killed before that has already replaced subnet.env, which named them as well.
        """
        self._path = path
        self._earlier = earlier
        self._is_clean = is_clean
        self._saved = ""
        self._log = structlog.get_logger().bind(part="lease")

    def save(self, record: Record, ground: Ground, put_due: float) -> None:
        """A disk that is full costs the file, not the lease."""
        if self._earlier and self._is_clean():
            self._earlier = ()
        network = ground.network
        text = render_state(
            SavedState(
                prefix=ground.host.prefix,
                node_id=ground.host.node_id,
                networks=tuple(dict.fromkeys((*network.config.networks, *network.former, *self._earlier))),
                subnets=record.subnets,
                etcd_lease=record.etcd_lease,
                mac=ground.host.external.mac,
                mac_seed=ground.host.mac_seed,
                put_due=put_due,
            )
        )
        if text == self._saved:
            return
        try:
            write_atomically(self._path, text)
            self._saved = text
        except OSError as error:
            self._log.warning("state_not_saved", path=str(self._path), error=str(error))
