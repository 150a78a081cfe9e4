"""FDB entries, neighbours, nexthop objects and routes: the tables with rows for every peer.

All four are read and written through one netlink socket and a codec of our own, since a library's 200 µs a
message would be 8 s of CPU for ten thousand peers.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import groupby, product
from operator import itemgetter

from flanneld_py.addresses import FAMILIES, Family, IPAddress, IPNetwork
from flanneld_py.core.ownership import nexthop_ids, route_mark
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.links import (
    Claims,
    FoundRoute,
    OwnDevices,
    RouteMark,
    device_name,
    is_marked,
    number,
    read_main_routes,
    read_overlay_devices,
)
from flanneld_py.drivers.neighbours import read_fdb, read_neighbours
from flanneld_py.drivers.netlink import Failure, NetlinkSocket, attributes, understanding
from flanneld_py.drivers.nexthopids import NexthopIds
from flanneld_py.drivers.oddrows import ODD_NEXTHOP, odd_hop
from flanneld_py.drivers.refusals import UnknownReferent, conflict, explain
from flanneld_py.errors import KernelError
from flanneld_py.model import (
    NEXTHOP_PROTOCOL,
    ROUTE_PROTOCOL,
    NextHop,
    Op,
    Outcome,
    Route,
    Scope,
    State,
    Table,
    Verb,
    successes,
)

ALREADY_GONE = {errno.ENOENT, errno.ESRCH, errno.ENODEV}
PREPARING = -1
"""In the place of an op's number: a message whose failure does not matter."""

USUAL_MARK = {version: RouteMark(ROUTE_PROTOCOL, 0, metric) for version, metric in rt.METRIC.items()}


class RtnetlinkTables:
    """Driver of the tables fdb, neighs, nexthops and routes.

    A route of somebody else's is never replaced: one that is new is set so that the kernel refuses it where
    another stands. Where this process knew a route of ours, whoever replaced it took it from us, and it is
    put back; a process that starts later cannot tell, and reports the conflict.

    `observe` also learns what a plan does not show: the ids behind nexthops, and what lies under a key that
    has more rows than one, so that `apply` can set or delete the key as a whole.

    Args:
        prefix: the etcd prefix, which marks our links and IPv6 routes, and fixes the ids of our nexthop
            objects.
    """

    tables: tuple[Table, ...] = ("fdb", "neighs", "nexthops", "routes")

    def __init__(self, prefix: str) -> None:
        self._devices = OwnDevices(prefix)
        self._ids = NexthopIds(nexthop_ids(prefix))
        self._mark = route_mark(prefix)
        self._socket = NetlinkSocket()
        self._odd_fdb: set[tuple[str, str]] = set()
        # Destinations at whose usual mark a route of ours stood, and may be replaced.
        self._held: set[IPNetwork] = set()
        self._beside: dict[IPNetwork, str] = {}  # a route of ours: the foreign one that was set beside it
        self._usurpers: dict[IPNetwork, FoundRoute] = {}  # where ours stood: the one that took its place
        # Of each destination under which there is other than one route with the usual mark.
        self._marks: dict[IPNetwork, list[RouteMark]] = {}
        # Of IPv6 routes: while one leads to its gateway's own address through another device, the kernel
        # refuses the new one ("device mismatch") instead of replacing the old (ip6_route_check_nh_onlink).
        self._devices6: dict[IPNetwork, str] = {}
        self._indexes: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._setters: dict[Table, Callable[[Sequence[Op]], list[bytes]]] = {
            "fdb": self._set_fdb,
            "neighs": self._set_neighbours,
            "nexthops": self._set_nexthops,
            "routes": self._set_routes,
        }

    @property
    def port_ids(self) -> frozenset[int]:
        """The netlink port ids we write from, by which a monitor knows our own changes."""
        return frozenset({self._socket.port_id})

    def close(self) -> None:
        self._socket.close()

    # --- write ------------------------------------------------------------------------------------

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        self._indexes = {}
        errors: dict[int, str] = {}
        requests: list[bytes] = []
        owners: list[int] = []
        runs = list(_by_table(ops))
        for first, run in runs:
            encoded, places = self._encode_all(first, run) or self._encode_each(first, run, errors)
            requests += encoded
            owners += places
        answers = self._socket.transact(requests)
        if any(answers):
            answered = zip(owners, answers, strict=True)
            failures = {place: failure for place, failure in answered if failure and place != PREPARING}
            errors |= self._explain(ops, failures)
        for first, run in runs:
            self._learn(first, run, errors)
        return [Outcome(op, errors.get(at)) for at, op in enumerate(ops)] if errors else successes(ops)

    def _encode_all(self, first: int, ops: Sequence[Op]) -> tuple[list[bytes], Sequence[int]] | None:
        """One message for each op, and its place; None: for some there are more, or none can be made."""
        verb, table = ops[0][:2]
        odd = {
            "fdb": self._odd_fdb,
            "nexthops": not self._ids.is_room(len(ops)),  # so that an id given is an id used
            "routes": self._marks or self._devices6 or self._usurpers,
        }
        if verb == "set" and not odd.get(table):
            with suppress(UnknownReferent, ValueError):
                return self._setters[table](ops), range(first, first + len(ops))
        return None

    def _encode_each(
        self, first: int, ops: Sequence[Op], errors: dict[int, str]
    ) -> tuple[list[bytes], list[int]]:
        """The messages, and the place of the op that each decides; `errors`: takes why others have none.

        `first`: the place of the first op.
        """
        requests: list[bytes] = []
        owners: list[int] = []
        for place, op in enumerate(ops, first):
            try:
                if op.verb == "del":
                    encoded = self._delete(op)
                    owners += [place] * len(encoded)
                else:
                    before = self._before(op)
                    encoded = [*before, *self._setters[op.table]([op])]
                    owners += [PREPARING] * len(before) + [place]
            except UnknownReferent as unknown:
                if op.verb == "set":
                    errors[place] = str(unknown)
            except ValueError as error:
                errors[place] = str(error)
            else:
                requests += encoded
        return requests, owners

    def _before(self, op: Op) -> list[bytes]:
        """What deletes what stands in the way of a "set"."""
        if op.table == "fdb" and op.key in self._odd_fdb:
            return self._delete(op)
        if op.table == "routes":
            return [rt.delete_route(op.key, *mark) for mark in self._in_the_way(op.key, op.value.nexthop.dev)]
        return []

    def _explain(self, ops: Sequence[Op], failures: Mapping[int, Failure]) -> dict[int, str]:
        """Place of each op that has failed → why."""
        refused = {
            ops[place].key
            for place, (code, _) in failures.items()
            # IPv6 says EINVAL if one to the gateway itself leads elsewhere.
            if ops[place].table == "routes" and code in (errno.EEXIST, errno.EINVAL)
        } - self._held
        foreign = self._foreign_routes(refused) if refused else {}
        return {
            place: conflict(ops[place], foreign[ops[place].key])
            if ops[place].key in foreign and ops[place].verb == "set"
            else explain(ops[place], refused_so)
            for place, refused_so in failures.items()
            if ops[place].verb == "set" or refused_so.code not in ALREADY_GONE
        }

    def _learn(self, first: int, ops: Sequence[Op], errors: dict[int, str]) -> None:
        """Keep what `observe` learnt in step with what `apply` changed."""
        verb, table = ops[0][:2]
        done = [op for place, op in enumerate(ops, first) if place not in errors] if errors else ops
        if table == "nexthops":
            failed = [op for place, op in enumerate(ops, first) if place in errors] if errors else []
            gone = done if verb == "del" else failed
            self._ids.forget(op.key for op in gone)
        elif table == "fdb" and self._odd_fdb:
            self._odd_fdb.difference_update(op.key for op in done)
        elif table == "routes":
            self._learn_routes(verb, done)

    def _learn_routes(self, verb: Verb, done: Sequence[Op]) -> None:
        keys = [op.key for op in done]
        for known in (self._marks, self._usurpers, self._devices6):
            for key in keys if known else ():
                known.pop(key, None)
        if verb == "set":
            self._held.update(keys)
            self._devices6 |= {op.key: op.value.nexthop.dev for op in done if op.key.version == 6}
        else:
            self._held.difference_update(keys)

    def _indexes_of(self, devices: Iterable[str]) -> dict[str, int]:
        return {dev: self._index(dev) for dev in devices}

    def _index(self, dev: str) -> int:
        index = self._indexes.get(dev)
        if index is None:
            try:
                index = self._indexes[dev] = socket.if_nametoindex(dev)
            except OSError:
                raise UnknownReferent(f"device {dev} does not exist") from None
        return index

    def _set_fdb(self, ops: Sequence[Op]) -> list[bytes]:
        index_of = self._indexes_of({op.key[0] for op in ops})
        return rt.set_fdb((index_of[dev], address, mac) for _, _, (dev, mac), address in ops)

    def _set_neighbours(self, ops: Sequence[Op]) -> list[bytes]:
        index_of = self._indexes_of({op.key[0] for op in ops})
        return rt.set_neighbours((index_of[dev], address, mac) for _, _, (dev, address), mac in ops)

    def _set_nexthops(self, ops: Sequence[Op]) -> list[bytes]:
        index_of = self._indexes_of({op.key.dev for op in ops})
        without = next((op.key.dev for op in ops if op.key.via is None), None)
        if without is not None:
            raise ValueError(f"a nexthop object on {without} has no gateway")
        requests = []
        for _, _, hop, _ in ops:
            # The kernel may have flushed a known one with its device: then this makes it again.
            number, new = self._ids.give(hop)
            index = index_of[hop.dev]
            requests.append(
                rt.set_nexthop(number, NEXTHOP_PROTOCOL, index, hop.via, onlink=hop.onlink, new=new)
            )
        return requests

    def _set_routes(self, ops: Sequence[Op]) -> list[bytes]:
        return [self._set_route(op) for op in ops]

    def _set_route(self, op: Op) -> bytes:
        (dev, via, onlink), protocol = op.value
        if self._beside and op.key in self._beside:  # to hash a network takes a microsecond
            raise ValueError(conflict(op, self._beside[op.key]))
        new = not self._held or op.key not in self._held
        if via is None:
            return self._direct_route(op.key, protocol, self._index(dev), new=new)
        if op.key.version == 4:
            numbers = self._ids.of.get(op.value.nexthop)
            if not numbers:
                raise UnknownReferent(f"nexthop {via} on device {dev} does not exist")
            return rt.set_route4(op.key, protocol, numbers[0], new=new)
        return rt.set_route6(op.key, protocol, self._index(dev), via, self._mark, onlink=onlink, new=new)

    def _in_the_way(self, destination: IPNetwork, dev: str) -> list[RouteMark]:
        """What must go before a route through this device; else the kernel replaces ours, of any protocol."""
        marks = self._marks.get(destination)
        usual = USUAL_MARK[destination.version]
        elsewhere = self._devices6.get(destination, dev) != dev
        if elsewhere or (marks and [mark[1:] for mark in marks] != [usual[1:]]):
            return marks or [usual]
        usurper = self._usurpers.get(destination) if destination.version == 6 else None
        return [usurper.mark] if usurper is not None and usurper.dev != dev else []  # as with _devices6

    def _direct_route(self, destination: IPNetwork, protocol: int, index: int, *, new: bool) -> bytes:
        if destination.version == 4:
            return rt.set_direct_route4(destination, protocol, index, new=new)
        return rt.set_direct_route6(destination, protocol, index, self._mark, new=new)

    def _delete(self, op: Op) -> list[bytes]:
        if op.table == "nexthops":
            return [rt.delete_nexthop(number) for number in self._ids.of.get(op.key, ())]
        if op.table == "routes":
            marks = self._marks.get(op.key, [USUAL_MARK[op.key.version]])
            return [rt.delete_route(op.key, *mark) for mark in marks]
        dev, rest = op.key
        delete = rt.delete_fdb if op.table == "fdb" else rt.delete_neighbour
        return [delete(self._index(dev), rest)]

    # --- read -------------------------------------------------------------------------------------

    @understanding("routes and neighbours")
    def observe(self, scope: Scope) -> State:
        self._names, self._marks, self._devices6 = {}, {}, {}
        self._odd_fdb, self._beside, self._usurpers = set(), {}, {}
        inside = rt.Inside(scope.networks)
        fdb: dict[tuple[str, str], IPAddress] = {}
        neighs: dict[tuple[str, IPAddress], str] = {}
        devices = read_overlay_devices(self._socket)
        self._devices.look(devices)
        own = {device.index: device for device in devices if self._devices.is_ours(device)}
        for index, device in own.items():
            if device.kind == "vxlan":
                entries, odd = read_fdb(self._socket, index, device.name)
                fdb.update(entries)
                self._odd_fdb |= odd
                neighs.update(read_neighbours(self._socket, index, device.name, inside))
        others = {device.index for device in devices if is_marked(device.alias)} - own.keys()
        every = [
            route
            for family in FAMILIES
            for route in self._main_routes(family, ROUTE_PROTOCOL)
            if not route.is_blackhole
        ]
        found = [route for route in every if not self._is_anothers(route, others)]
        within = [route for route in found if inside.network(route.base, route.length)]
        used = {route.nexthop for route in within}
        used_elsewhere = {route.nexthop for route in found} - used
        hops = self._observe_nexthops(Claims(used | self._ids.known, used_elsewhere, others))
        routes: dict[IPNetwork, Route] = {}
        for route in within:
            # One of ours through an id of another range was made by the daemon of another prefix.
            if not route.nexthop or route.nexthop in self._ids.range or len(route.base) == 16:
                self._add_route(route, hops, routes)
            else:
                self._held.discard(route.destination)
        self._observe_beside(scope, routes)
        if self._held.difference(routes):  # to hash ten thousand networks once more takes 8 ms
            self._held &= scope.adoptable.keys()
        self._held.update(filter(self._is_usual, routes) if self._marks else routes)
        if len(found) < len(every):
            # Another daemon's is not taken back: two that do that would fight without end.
            self._held -= {route.destination for route in every if self._is_anothers(route, others)}
        return State(fdb=fdb, neighs=neighs, nexthops=dict.fromkeys(self._ids.of, True), routes=routes)

    def _is_anothers(self, route: FoundRoute, devices: AbstractSet[int]) -> bool:
        """Whether another daemon has made it; `devices`: indexes of those that bear such a one's mark."""
        return route.index_of_dev in devices or route.is_anothers(self._mark)

    def _name(self, index: int) -> str:
        name = self._names.get(index)
        if name is None:
            name = self._names[index] = device_name(index)
        return name

    def _observe_nexthops(self, claims: Claims) -> dict[int, NextHop]:
        """Id → nexthop of ours, which are known from now on."""
        hops: dict[int, NextHop] = {}
        taken: set[int] = set()
        for datagram, start, end in self._socket.dump(
            "nexthops", rt.RTM_GETNEXTHOP, rt.NHMSG.pack(rt.AF_UNSPEC, 0, 0, 0)
        ):
            _, _, protocol, flags = rt.NHMSG.unpack_from(datagram, start)
            found = attributes(datagram, start + rt.NHMSG.size, end)
            ident = number(found[rt.NHA_ID])
            if ident not in self._ids.range:
                continue
            taken.add(ident)
            hop, index = ODD_NEXTHOP, number(found.get(rt.NHA_OIF))
            if rt.NHA_GATEWAY in found and index:
                hop = NextHop(
                    self._name(index), rt.address(found[rt.NHA_GATEWAY]), bool(flags & rt.RTNH_F_ONLINK)
                )
            if claims.cover(ident, protocol, index):
                hops[ident] = hop
        self._ids.seen(taken, hops)
        return hops

    def _observe_beside(self, scope: Scope, routes: dict[IPNetwork, Route]) -> None:
        """What people set at the destinations of known records: Go flannel's leftovers, and what is foreign.

        A foreign one beside ours may carry the traffic instead. Only by hand does it get there, so the
        routes of other programs, of which there may be a million, are not looked through.
        """
        ours: AbstractSet[IPNetwork] | None = None
        for family, protocol in product(FAMILIES, (rt.RTPROT_BOOT, rt.RTPROT_STATIC)):
            for route in self._main_routes(family, protocol):
                if not route.length or not route.is_usual:
                    continue  # the default route, for one, is no record's
                destination = route.destination
                ours = routes.keys() & scope.adoptable.keys() if ours is None else ours
                gateways = scope.adoptable.get(destination)
                if gateways is None:
                    continue
                if protocol == rt.RTPROT_BOOT and route.hop is not None and route.hop.via in gateways:
                    self._add_route(route, {}, routes)
                elif destination in ours:
                    self._beside[destination] = route.describe()
                    routes[destination] = Route(odd_hop(destination))
                elif destination in self._held:
                    self._usurpers[destination] = route

    def _foreign_routes(self, wanted: Collection[IPNetwork]) -> dict[IPNetwork, str]:
        """Of the destinations at which the kernel refused ours: what stands there."""
        keys = {(subnet.network_address.packed, subnet.prefixlen): subnet for subnet in wanted}
        found: dict[IPNetwork, str] = {}
        with suppress(KernelError):  # the kernel's own words must do then
            for family in {subnet.version for subnet in wanted}:
                for route in self._main_routes(family):
                    subnet = keys.get((route.base, route.length))
                    if subnet is not None and route.is_usual:
                        found.setdefault(subnet, route.describe())
        return found

    def _main_routes(self, family: Family, protocol: int = 0) -> Iterator[FoundRoute]:
        return read_main_routes(self._socket, family, self._name, protocol)

    def _is_usual(self, destination: IPNetwork) -> bool:
        """Whether a route of ours stands where a new one would go."""
        usual = USUAL_MARK[destination.version]
        return any(mark[1:] == usual[1:] for mark in self._marks.get(destination, [usual]))

    def _add_route(
        self, route: FoundRoute, hops: Mapping[int, NextHop], routes: dict[IPNetwork, Route]
    ) -> None:
        destination, mark = route.destination, route.mark
        usual = USUAL_MARK[destination.version]
        hop = hops.get(route.nexthop) if route.nexthop else route.hop
        if hop is None or not route.is_usual:
            hop = odd_hop(destination)
        found = Route(hop, mark.protocol)
        if routes.setdefault(destination, found) is not found:
            self._marks.setdefault(destination, [usual]).append(mark)
            routes[destination] = Route(odd_hop(destination))
            return
        if mark != usual:
            self._marks[destination] = [mark]
        if destination.version == 6:
            self._devices6[destination] = hop.dev


def _by_table(ops: Iterable[Op]) -> Iterator[tuple[int, Sequence[Op]]]:
    """Ops of one table each, and the place of their first."""
    first = 0
    for _, run in groupby(ops, key=itemgetter(1)):
        batch = list(run)
        yield first, batch
        first += len(batch)
