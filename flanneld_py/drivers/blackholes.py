"""Blackhole routes: what is sent to an address of our own subnet that no pod has ends here."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from flanneld_py.addresses import FAMILIES
from flanneld_py.core.ownership import route_mark
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.links import read_main_routes
from flanneld_py.drivers.netlink import Failure, NetlinkSocket, understanding
from flanneld_py.model import ROUTE_PROTOCOL, Op, Outcome, Scope, State, Table


class Blackholes:
    """Driver of the table blackholes: routes of type blackhole, our protocol and our metric for them.

    Args:
        prefix: the etcd prefix, which marks ours.
    """

    tables: tuple[Table, ...] = ("blackholes",)

    def __init__(self, prefix: str) -> None:
        self._mark = route_mark(prefix)
        self._socket = NetlinkSocket()

    @property
    def port_ids(self) -> frozenset[int]:
        """The netlink port ids we write from, by which a monitor knows our own changes."""
        return frozenset({self._socket.port_id})

    def close(self) -> None:
        self._socket.close()

    @understanding("blackhole routes")
    def observe(self, scope: Scope) -> State:
        inside = rt.Inside(scope.networks)
        found = (
            route
            for family in FAMILIES
            for route in read_main_routes(
                self._socket, family, lambda _: "", ROUTE_PROTOCOL, kind=rt.RTN_BLACKHOLE
            )
        )
        ours = (
            route
            for route in found
            if route.is_blackhole
            and inside.network(route.base, route.length)
            and not route.is_anothers(self._mark)
        )
        return State(blackholes={route.destination: True for route in ours})

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        refused = self._socket.transact([_message(op, self._mark) for op in ops])
        return [Outcome(op, _explain(op, why)) for op, why in zip(ops, refused, strict=True)]


def _explain(op: Op, refused: Failure | None) -> str | None:
    if refused is None or (op.verb == "del" and refused.code == errno.ESRCH):
        return None
    if refused.code == errno.EEXIST:
        return f"a route to {op.key} with metric {rt.BLACKHOLE_METRIC} is not ours; remove it"
    return f"cannot {op.verb} a blackhole route to {op.key}: {refused.reason}"


def _message(op: Op, mark: int) -> bytes:
    if op.verb == "set":
        return rt.set_blackhole(op.key, ROUTE_PROTOCOL, mark)
    return rt.delete_route(op.key, ROUTE_PROTOCOL, 0, rt.BLACKHOLE_METRIC)
