"""FDB entries, neighbours, nexthop objects and routes: the tables with rows for every peer.

All four are read and written through one netlink socket and a codec of our own, since a library's 200 µs a
message would be 8 s of CPU for ten thousand peers.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from flanneld_py.core.ownership import link_alias, nexthop_ids
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.links import read_devices
from flanneld_py.drivers.netlink import U32, NetlinkSocket, attribute, attributes
from flanneld_py.model import (
    FAMILIES,
    ROUTE_PROTOCOL,
    Family,
    IPAddress,
    IPNetwork,
    NextHop,
    Op,
    Outcome,
    Route,
    Scope,
    State,
    Table,
)

ALREADY_GONE = {errno.ENOENT, errno.ESRCH, errno.ENODEV}
NOT_ONE_GATEWAY: dict[int, IPAddress] = {4: IPv4Address(0), 6: IPv6Address(0)}
"""IP version → the address that stands in a row of ours which the model cannot express.

A route of ours may have been changed into a blackhole, one without gateway or with several, an FDB entry into
one with a port or device of its own. No such row is ever wanted, so a plan replaces or deletes it.
"""

ODD_NEXTHOP = NextHop("", NOT_ONE_GATEWAY[4], onlink=False)
ODD_FDB_ATTRIBUTES = {rt.NDA_PORT, rt.NDA_VNI, rt.NDA_IFINDEX, rt.NDA_NH_ID}
ETHERNET_GROUP_BIT = 0x01
PREPARING = -1
"""In the place of an op's number: a message whose failure does not matter."""


class RouteMark(NamedTuple):
    """What tells the routes to one destination apart."""

    protocol: int
    tos: int
    metric: int


USUAL_MARK = {version: RouteMark(ROUTE_PROTOCOL, 0, metric) for version, metric in rt.METRIC.items()}


class UnknownReferent(Exception):
    """An op names a device or nexthop that does not exist; the text says which."""


class RtnetlinkTables:
    """Driver of the tables fdb, neighs, nexthops and routes.

    `observe` also learns what a plan does not show: the ids behind nexthops, and what lies under a key that
    has more rows than one, so that `apply` can set or delete the key as a whole.

    Args:
        prefix: the etcd prefix, which marks our links and fixes the ids of our nexthop objects.
    """

    tables: tuple[Table, ...] = ("fdb", "neighs", "nexthops", "routes")

    def __init__(self, prefix: str) -> None:
        self._alias = link_alias(prefix)
        self._ids = nexthop_ids(prefix)
        self._socket = NetlinkSocket()
        self._nexthops: dict[NextHop, list[int]] = {}
        self._taken: set[int] = set()
        self._last_id = self._ids.start - 1
        self._odd_fdb: set[tuple[str, str]] = set()
        # Of each destination under which there is other than one route with the usual mark.
        self._marks: dict[IPNetwork, list[RouteMark]] = {}
        # Of IPv6 routes: while one leads to its gateway's own address through another device, the kernel
        # refuses the new one ("device mismatch") instead of replacing the old (ip6_route_check_nh_onlink).
        self._devices6: dict[IPNetwork, str] = {}
        self._indexes: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._encoders: dict[tuple[str, str], Callable[[Op], list[bytes]]] = {
            ("set", "fdb"): self._set_fdb,
            ("del", "fdb"): self._delete_fdb,
            ("set", "neighs"): self._set_neighbour,
            ("del", "neighs"): self._delete_neighbour,
            ("set", "nexthops"): self._set_nexthop,
            ("del", "nexthops"): self._delete_nexthop,
            ("set", "routes"): self._set_route,
            ("del", "routes"): self._delete_route,
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
        requests: list[bytes] = []
        owners: list[int] = []
        errors: dict[int, str] = {}
        for number, op in enumerate(ops):
            try:
                encoded = self._encoders[op.verb, op.table](op)
            except UnknownReferent as unknown:
                if op.verb == "set":
                    errors[number] = str(unknown)
                continue
            except ValueError as error:
                errors[number] = str(error)
                continue
            if not encoded:
                continue
            requests += encoded
            # A "set" may delete first what stands in its way; only its last message decides.
            preparing = PREPARING if op.verb == "set" else number
            owners += [preparing] * (len(encoded) - 1) + [number]
        for number, failure in zip(owners, self._socket.transact(requests), strict=True):
            if failure is None or number == PREPARING:
                continue
            if ops[number].verb == "set" or failure.code not in ALREADY_GONE:
                errors[number] = failure.reason
        self._learn(ops, errors)
        return [Outcome(op, errors.get(number)) for number, op in enumerate(ops)]

    def _learn(self, ops: Sequence[Op], errors: dict[int, str]) -> None:
        """Keep what `observe` learnt in step with what `apply` changed."""
        for number, op in enumerate(ops):
            succeeded = number not in errors
            if op.table == "nexthops":
                if succeeded == (op.verb == "del"):
                    self._nexthops.pop(op.key, None)
            elif op.table == "fdb" and succeeded:
                self._odd_fdb.discard(op.key)
            elif op.table == "routes" and succeeded:
                self._marks.pop(op.key, None)
                self._devices6.pop(op.key, None)

    def _index(self, dev: str) -> int:
        index = self._indexes.get(dev)
        if index is None:
            try:
                index = self._indexes[dev] = socket.if_nametoindex(dev)
            except OSError:
                raise UnknownReferent(f"device {dev} does not exist") from None
        return index

    def _set_fdb(self, op: Op) -> list[bytes]:
        dev, mac = op.key
        index = self._index(dev)
        wanted = rt.set_fdb(index, mac, op.value)
        return [rt.delete_fdb(index, mac), wanted] if op.key in self._odd_fdb else [wanted]

    def _delete_fdb(self, op: Op) -> list[bytes]:
        dev, mac = op.key
        return [rt.delete_fdb(self._index(dev), mac)]

    def _set_neighbour(self, op: Op) -> list[bytes]:
        dev, address = op.key
        return [rt.set_neighbour(self._index(dev), address, op.value)]

    def _delete_neighbour(self, op: Op) -> list[bytes]:
        dev, address = op.key
        return [rt.delete_neighbour(self._index(dev), address)]

    def _set_nexthop(self, op: Op) -> list[bytes]:
        hop: NextHop = op.key
        index = self._index(hop.dev)
        known = hop in self._nexthops
        if not known:
            self._nexthops[hop] = [self._free_id()]
        # The kernel may have flushed a known one with its device: then this makes it again.
        number = self._nexthops[hop][0]
        return [rt.set_nexthop(number, ROUTE_PROTOCOL, index, hop.via, onlink=hop.onlink, new=not known)]

    def _free_id(self) -> int:
        for _ in self._ids:
            self._last_id = self._last_id + 1 if self._last_id + 1 in self._ids else self._ids.start
            if self._last_id not in self._taken:
                self._taken.add(self._last_id)
                return self._last_id
        raise ValueError(f"all {len(self._ids)} nexthop ids of this etcd prefix are in use")

    def _delete_nexthop(self, op: Op) -> list[bytes]:
        return [rt.delete_nexthop(number) for number in self._nexthops.get(op.key, ())]

    def _set_route(self, op: Op) -> list[bytes]:
        (dev, via, onlink), protocol = op.value
        if op.key.version == 4:
            numbers = self._nexthops.get(op.value.nexthop)
            if numbers is None:
                raise UnknownReferent(f"nexthop {via} on device {dev} does not exist")
            wanted = rt.set_route4(op.key, protocol, numbers[0])
        else:
            wanted = rt.set_route6(op.key, protocol, self._index(dev), via, onlink=onlink)
        usual = USUAL_MARK[op.key.version]
        marks = self._marks.get(op.key, [usual])
        if [mark[1:] for mark in marks] == [usual[1:]] and self._devices6.get(op.key, dev) == dev:
            return [wanted]  # the kernel puts it in the place of the other, also of another protocol's
        return [*(rt.delete_route(op.key, *mark) for mark in marks), wanted]

    def _delete_route(self, op: Op) -> list[bytes]:
        marks = self._marks.get(op.key, [USUAL_MARK[op.key.version]])
        return [rt.delete_route(op.key, *mark) for mark in marks]

    # --- read -------------------------------------------------------------------------------------

    def observe(self, scope: Scope) -> State:
        self._names = {}
        self._odd_fdb = set()
        self._marks = {}
        self._devices6 = {}
        inside = rt.Inside(scope.networks)
        fdb: dict[tuple[str, str], IPAddress] = {}
        neighs: dict[tuple[str, IPAddress], str] = {}
        for device in read_devices(self._socket, rt.VXLAN_LINKS):
            if device.alias == self._alias:
                self._observe_fdb(device.index, device.name, fdb)
                self._observe_neighbours(device.index, device.name, inside, neighs)
        hops = self._observe_nexthops()
        routes: dict[IPNetwork, Route] = {}
        for family in FAMILIES:
            self._observe_routes(family, inside, hops, routes)
            if any(subnet.version == family for subnet in scope.adoptable):
                self._observe_adoptable(family, scope.adoptable, hops, routes)
        return State(fdb=fdb, neighs=neighs, nexthops=dict.fromkeys(self._nexthops, True), routes=routes)

    def _name(self, index: int) -> str:
        name = self._names.get(index)
        if name is None:
            try:
                name = socket.if_indextoname(index)
            except OSError:
                name = ""
            self._names[index] = name
        return name

    def _observe_fdb(self, index: int, dev: str, fdb: dict[tuple[str, str], IPAddress]) -> None:
        body = rt.NDMSG.pack(rt.AF_BRIDGE, index, 0, 0, 0)
        for datagram, start, end in self._socket.dump("FDB entries", rt.RTM_GETNEIGH, body):
            _, owner, state, _, _ = rt.NDMSG.unpack_from(datagram, start)
            if owner != index or not state & rt.NUD_PERMANENT:
                continue
            found = attributes(datagram, start + rt.NDMSG.size, end)
            mac = found.get(rt.NDA_LLADDR, b"")
            if not any(mac) or mac[0] & ETHERNET_GROUP_BIT:
                continue  # the device's default destination, or multicast
            key = (dev, mac.hex(":"))
            if not ODD_FDB_ATTRIBUTES.isdisjoint(found):
                fdb[key] = NOT_ONE_GATEWAY[4]
                self._odd_fdb.add(key)
            elif rt.NDA_DST in found:
                fdb[key] = rt.address(found[rt.NDA_DST])

    def _observe_neighbours(
        self, index: int, dev: str, inside: rt.Inside, neighs: dict[tuple[str, IPAddress], str]
    ) -> None:
        body = rt.NDMSG.pack(rt.AF_UNSPEC, 0, 0, 0, 0) + attribute(rt.NDA_IFINDEX, U32.pack(index))
        for datagram, start, end in self._socket.dump("neighbours", rt.RTM_GETNEIGH, body):
            _, owner, state, _, _ = rt.NDMSG.unpack_from(datagram, start)
            if owner != index or state != rt.NUD_PERMANENT:
                continue
            found = attributes(datagram, start + rt.NDMSG.size, end)
            destination, mac = found.get(rt.NDA_DST, b""), found.get(rt.NDA_LLADDR, b"")
            if len(mac) == 6 and inside.address(destination):
                neighs[dev, rt.address(destination)] = mac.hex(":")

    def _observe_nexthops(self) -> dict[int, NextHop]:
        """Id → nexthop of ours; fills the map from nexthops to ids."""
        hops: dict[int, NextHop] = {}
        self._nexthops = {}
        self._taken = set()
        for datagram, start, end in self._socket.dump(
            "nexthops", rt.RTM_GETNEXTHOP, rt.NHMSG.pack(rt.AF_UNSPEC, 0, 0, 0)
        ):
            _, _, protocol, flags = rt.NHMSG.unpack_from(datagram, start)
            found = attributes(datagram, start + rt.NHMSG.size, end)
            (number,) = U32.unpack(found[rt.NHA_ID])
            if number not in self._ids:
                continue
            self._taken.add(number)
            if protocol != ROUTE_PROTOCOL:
                continue
            hop = ODD_NEXTHOP
            if rt.NHA_GATEWAY in found and rt.NHA_OIF in found:
                dev = self._name(U32.unpack(found[rt.NHA_OIF])[0])
                hop = NextHop(dev, rt.address(found[rt.NHA_GATEWAY]), bool(flags & rt.RTNH_F_ONLINK))
            hops[number] = hop
            self._nexthops.setdefault(hop, []).append(number)
        return hops

    def _observe_routes(
        self, family: Family, inside: rt.Inside, hops: dict[int, NextHop], routes: dict[IPNetwork, Route]
    ) -> None:
        for base, length, mark, hop in self._main_routes(family, ROUTE_PROTOCOL, hops):
            if inside.network(base, length):
                self._add_route(rt.network(base, length), mark, hop, routes)

    def _observe_adoptable(
        self,
        family: Family,
        adoptable: Mapping[IPNetwork, frozenset[IPAddress]],
        hops: dict[int, NextHop],
        routes: dict[IPNetwork, Route],
    ) -> None:
        for base, length, mark, hop in self._main_routes(family, rt.RTPROT_BOOT, hops):
            destination = rt.network(base, length)
            gateways = adoptable.get(destination, frozenset())
            if hop is not None and hop.via in gateways and mark[1:] == (0, rt.METRIC[family]):
                self._add_route(destination, mark, hop, routes)

    def _main_routes(
        self, family: Family, protocol: int, hops: dict[int, NextHop]
    ) -> Iterator[tuple[bytes, int, RouteMark, NextHop | None]]:
        """Destination, its length, mark and the one gateway, if so, of table main's routes of a protocol."""
        request = rt.RTMSG.pack(rt.AF[family], 0, 0, 0, rt.RT_TABLE_MAIN, protocol, 0, 0, 0)
        for datagram, start, end in self._socket.dump("routes", rt.RTM_GETROUTE, request, rt.NO_ROUTES):
            owner, length, _, tos, _, made_by, _, kind, flags = rt.RTMSG.unpack_from(datagram, start)
            found = attributes(datagram, start + rt.RTMSG.size, end)
            if owner != rt.AF[family] or made_by != protocol or rt.RTA_DST not in found:
                continue
            hop = None
            if rt.RTA_NH_ID in found:
                hop = hops.get(U32.unpack(found[rt.RTA_NH_ID])[0])
            elif kind == rt.RTN_UNICAST and rt.RTA_GATEWAY in found and rt.RTA_OIF in found:
                dev = self._name(U32.unpack(found[rt.RTA_OIF])[0])
                hop = NextHop(dev, rt.address(found[rt.RTA_GATEWAY]), bool(flags & rt.RTNH_F_ONLINK))
            metric = U32.unpack(found[rt.RTA_PRIORITY])[0] if rt.RTA_PRIORITY in found else 0
            yield found[rt.RTA_DST], length, RouteMark(protocol, tos, metric), hop

    def _add_route(
        self, destination: IPNetwork, mark: RouteMark, hop: NextHop | None, routes: dict[IPNetwork, Route]
    ) -> None:
        usual = USUAL_MARK[destination.version]
        odd = NextHop("", NOT_ONE_GATEWAY[destination.version], onlink=False)
        if destination in routes:
            self._marks.setdefault(destination, [usual]).append(mark)
            routes[destination] = Route(odd)
            return
        if mark != usual:
            self._marks[destination] = [mark]
        if hop is None or mark[1:] != usual[1:]:
            hop = odd
        if destination.version == 6:
            self._devices6[destination] = hop.dev
        routes[destination] = Route(hop, mark.protocol)
