"""Targets for one set of inputs after another: a host that joins or leaves costs its own rows only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from flanneld_py.core.admission import Admission, Admitted
from flanneld_py.core.desired import rows_of
from flanneld_py.core.layered import changed
from flanneld_py.daemon.target import (
    Adoptable,
    Difference,
    Inputs,
    Settings,
    Target,
    target_for,
)
from flanneld_py.model import Record, Route, State, Table

OF_PEERS: tuple[Table, ...] = ("tunnel", "fdb", "neighs", "nexthops", "routes")
"""Tables in which peers have rows. Those of one that shares no address with others are its own."""

Rows = dict[Table, Mapping[Any, Any]]

NOTHING = State()
NO_ROWS: Rows = {table: {} for table in OF_PEERS}


class Aim:
    """Makes targets. Used by one thread."""

    def __init__(self) -> None:
        self._admission = Admission()
        self._inputs: Inputs | None = None
        self._backend_type = ""
        """As records of these inputs bear it."""
        self._last: Target | None = None
        self._devices: Counter[str] = Counter()
        """Of the routes: how many lead to each."""

    def target_of(self, inputs: Inputs, departed: Collection[Record], settings: Settings) -> Target:
        """The desired state for these inputs, with `differs` where little has changed.

        `departed`: peers that stay although they are not in the snapshot.

        Raises:
            ConfigError, HostError: the backend cannot work on this host as configured.
        """
        # Forgotten until this has worked.
        (last, self._last), (before, self._inputs) = (self._last, None), (self._inputs, None)
        alike = _alike(inputs, before)
        admitted = self._admit(inputs, departed, alike=alike)
        if last is not None and alike and not admitted.afresh:
            target = self._follow(last, inputs, admitted)
        else:
            target = target_for(inputs, settings, admitted.peers)
            self._devices = Counter(_leading_to(target.state.routes.values()))
        self._inputs, self._last = inputs, target._replace(differs=None)
        return target

    def _admit(self, inputs: Inputs, departed: Collection[Record], *, alike: bool) -> Admitted:
        """`alike`: these inputs are those of the last time but for the snapshot."""
        network, host, record = inputs.network, inputs.host, inputs.own.record
        if not alike:
            self._backend_type = network.backend.published(host, record).backend_type
        return self._admission.admit(
            inputs.snapshot, record, network.config, host, self._backend_type, departed
        )

    def _follow(self, last: Target, inputs: Inputs, admitted: Admitted) -> Target:
        """The last target, for the peers as they are now."""
        old = last.state
        gone, come = (_rows(inputs, peers) for peers in (admitted.removed, admitted.added))
        tables: Rows = {}
        want, have = NO_ROWS.copy(), NO_ROWS.copy()
        for table in OF_PEERS:
            before, leaving, coming = old.table(table), gone.table(table), come.table(table)
            if leaving or coming:
                tables[table], want[table] = changed(before, leaving, coming), coming
                have[table] = {key: before[key] for key in (*leaving, *coming) if key in before}
        state = replace(old, **tables) if tables else old
        self._devices.subtract(_leading_to(have["routes"].values()))
        self._devices.update(_leading_to(want["routes"].values()))
        return last._replace(
            state=state,
            peers=admitted.peers,
            scope=replace(last.scope, adoptable=Adoptable(inputs.snapshot, state)),
            devices=frozenset((*state.links, *(dev for dev, routes in self._devices.items() if routes))),
            differs=Difference(old, replace(old, **want), replace(old, **have)),
        )


def _alike(inputs: Inputs, last: Inputs | None) -> bool:
    """Whether all but the snapshot are the same objects."""
    return last is not None and all(
        new is old for new, old in zip(inputs._replace(snapshot=last.snapshot), last, strict=True)
    )


def _rows(inputs: Inputs, peers: Sequence[Record]) -> State:
    if not peers:
        return NOTHING
    return rows_of(inputs.network.backend.peer_rows, inputs.own.record, peers, inputs.host)


def _leading_to(routes: Iterable[Route]) -> Iterable[str]:
    return (route.nexthop.dev for route in routes)
