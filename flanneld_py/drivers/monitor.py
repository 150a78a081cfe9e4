"""What the kernel says of its own accord: a subscription to rtnetlink's notifications.

A notification is only a reason to look again, so what is heard is folded into a few flags, and what cannot
concern us (ordinary ARP, our own writes, routes of others) is dropped where it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.addresses import IPAddress, IPNetwork
from flanneld_py.core.ownership import link_alias, nexthop_ids
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.links import device_name, number, text
from flanneld_py.drivers.netlink import NLM_F_REPLACE, UNREADABLE, attributes, messages, open_socket
from flanneld_py.drivers.ownwrites import drop_own
from flanneld_py.drivers.subscription import Subscription
from flanneld_py.model import ROUTE_PROTOCOL, Scope, State, VxlanLink

GROUPS = {
    "RTNLGRP_LINK": 1,
    "RTNLGRP_NEIGH": 3,
    "RTNLGRP_IPV4_IFADDR": 5,
    "RTNLGRP_IPV4_ROUTE": 7,
    "RTNLGRP_IPV6_IFADDR": 9,
    "RTNLGRP_IPV6_ROUTE": 11,
    "RTNLGRP_NEXTHOP": 32,
}
"""linux/rtnetlink.h, enum rtnetlink_groups."""
LINK_FLAGS = 0x10041
"""IFF_UP, IFF_RUNNING, IFF_LOWER_UP (linux/if.h)."""
LINK_FACTS = (rt.IFLA_IFNAME, rt.IFLA_MTU, rt.IFLA_ADDRESS, rt.IFLA_IFALIAS)


class Heard(Struct, frozen=True):
    """What the notifications read by one `wait` amount to."""

    overflow: bool = False
    """Notifications were lost: look at everything."""
    links: frozenset[str] = frozenset()
    """Devices that were made, changed or deleted, or whose addresses were."""
    ours: bool = False
    """A neighbour, FDB entry, nexthop or route that may be ours was touched by somebody else."""
    host: bool = False
    """Links, addresses, default routes, or routes without gateway on a device below ours changed.

    Host facts are worth reading again.
    """


NOTHING = Heard()


class _Pending(Struct):
    """A `Heard` in the making."""

    overflow: bool = False
    links: set[str] = field(default_factory=set)
    ours: bool = False
    host: bool = False


class Notification(NamedTuple):
    """One message and where its body begins and ends."""

    kind: int
    flags: int
    datagram: bytes
    start: int
    end: int


class Followed(Struct, frozen=True):
    """What concerns us."""

    place: tuple[str, tuple[IPNetwork, ...]] | None = None
    """Prefix and Networks, of which all but `want` and `names` follows."""

    want: State = field(default_factory=State)
    names: frozenset[str] = frozenset()
    alias: str | None = None
    """Of our devices."""
    inside: rt.Inside = field(default_factory=lambda: rt.Inside(()))
    nexthop_ids: range = range(0)

    def carries_ours(self, dev: str) -> bool:
        """Whether a device that is not ours carries our packets. Asked for seldom, so looked up then."""
        below = (link.dev for link in self.want.links.values() if isinstance(link, VxlanLink))
        direct = (route.nexthop.dev for route in self.want.routes.values())
        return bool(dev) and dev not in self.names and (dev in below or dev in direct)


class Monitor(Subscription[Heard]):
    """Listens to links, addresses, neighbours, FDB entries, routes and nexthops.

    One thread calls `wait`; any thread may call `follow`, `interrupt` and `close`.

    Args:
        ignore_ports: netlink port ids whose changes are our own.

    Raises:
        KernelError: no netlink socket.
    """

    REST = 5

    def __init__(self, ignore_ports: Iterable[int] = ()) -> None:
        self.ignore_ports = frozenset(ignore_ports)
        self._followed = Followed()
        self._asked: frozenset[bytes] = frozenset()
        sock = open_socket()
        with suppress(OSError):  # only spares us to read them
            drop_own(sock, self.ignore_ports)
        super().__init__(sock, GROUPS.values())
        self._names: dict[int, str] = {}
        self._links: dict[int, tuple[object, ...]] = {}
        self._deleted: set[tuple[int, bytes]] = set()
        self._listeners = {
            rt.RTM_NEWLINK: self._link,
            rt.RTM_DELLINK: self._link,
            rt.RTM_NEWADDR: self._address,
            rt.RTM_DELADDR: self._address,
            rt.RTM_NEWNEIGH: self._neighbour,
            rt.RTM_DELNEIGH: self._neighbour,
            rt.RTM_NEWROUTE: self._route,
            rt.RTM_DELROUTE: self._route,
            rt.RTM_NEWNEXTHOP: self._nexthop,
            rt.RTM_DELNEXTHOP: self._nexthop,
        }

    def follow(self, want: State, scope: Scope) -> None:
        """Say what concerns us from now on: our devices and rows, and what lies in our Networks.

        A notification that agrees with `want` is no news: of an FDB entry the kernel does not say who changed
        it, so this is how our own writes are known.
        """
        last, place = self._followed, (scope.prefix, scope.networks)
        if place != last.place:
            last = Followed(
                place=place,
                alias=link_alias(scope.prefix),
                inside=rt.Inside(scope.networks),
                nexthop_ids=nexthop_ids(scope.prefix),
            )
        self._followed = replace(last, want=want, names=frozenset(want.links))

    def ask(self, addresses: Iterable[IPAddress]) -> None:
        """Say to which addresses the way matters: a route that leads there is news of the host."""
        self._asked = frozenset(address.packed for address in addresses)

    def _drain(self) -> Heard | None:
        pending = _Pending()
        followed, ignored = self._followed, self.ignore_ports
        for datagram in self._datagrams():
            if datagram is None:
                pending.overflow = True
                self._deleted.clear()
                self._names.clear()
                self._links.clear()
            if pending.overflow or datagram is None:
                continue  # everything will be looked at, whatever the rest is about
            try:
                for kind, flags, _, port, start, end in messages(datagram):
                    heard = Notification(kind, flags, datagram, start, end)
                    if port in ignored:
                        self._own_write(heard)
                    elif (listen := self._listeners.get(kind)) is not None:
                        listen(pending, followed, heard)
            except UNREADABLE:
                pending.overflow = True  # it was about something, and does not say what
        folded = Heard(pending.overflow, frozenset(pending.links), pending.ours, pending.host)
        return folded if folded != NOTHING else None

    def _own_write(self, heard: Notification) -> None:
        """Note the neighbours we delete: one is said to have failed, by us, then to be gone, by nobody."""
        if heard.kind == rt.RTM_NEWNEIGH:
            _, index, state, _, _ = rt.NDMSG.unpack_from(heard.datagram, heard.start)
            if state == rt.NUD_FAILED:
                self._deleted.add((index, _destination(heard)))

    def _name(self, index: int) -> str:
        name = self._names.get(index)
        if name is None:
            # Empty if it is gone already; the link's own notification names it.
            name = self._names[index] = device_name(index)
        return name

    def _link(self, pending: _Pending, followed: Followed, heard: Notification) -> None:
        family, _, index, flags, _ = rt.IFINFOMSG.unpack_from(heard.datagram, heard.start)
        if family == rt.AF_BRIDGE:
            return  # the state of a bridge's port
        found = attributes(heard.datagram, heard.start + rt.IFINFOMSG.size, heard.end)
        name = text(found.get(rt.IFLA_IFNAME, b""))
        if heard.kind == rt.RTM_DELLINK:
            changed = True
            self._links.pop(index, None)
            self._names.pop(index, None)
        else:
            facts = (flags & LINK_FLAGS, *(found.get(kind) for kind in LINK_FACTS))
            changed = self._links.get(index) != facts
            self._links[index] = facts
            self._names[index] = name
        if changed or name in followed.names:
            pending.links.add(name)
        # One of ours under another name.
        renamed = name not in followed.names and text(found.get(rt.IFLA_IFALIAS, b"")) == followed.alias
        pending.ours = pending.ours or (changed and renamed)
        pending.host = pending.host or changed

    def _address(self, pending: _Pending, _: Followed, heard: Notification) -> None:
        _, _, _, _, index = rt.IFADDRMSG.unpack_from(heard.datagram, heard.start)
        if name := self._name(index):
            pending.links.add(name)
        pending.host = True

    def _neighbour(self, pending: _Pending, followed: Followed, heard: Notification) -> None:
        family, index, state, _, _ = rt.NDMSG.unpack_from(heard.datagram, heard.start)
        if self._deleted and heard.kind == rt.RTM_DELNEIGH:
            gone = (index, _destination(heard))
            if gone in self._deleted:
                self._deleted.remove(gone)
                return
        dev = self._name(index)
        if pending.ours or dev not in followed.names:
            return
        touched = _fdb_touched if family == rt.AF_BRIDGE else _neighbour_touched
        pending.ours = touched(dev, state, heard, followed.want)

    def _route(self, pending: _Pending, followed: Followed, heard: Notification) -> None:
        header = rt.RTMSG.unpack_from(heard.datagram, heard.start)
        _, length, _, _, table, protocol, _, _, flags = header
        if table != rt.RT_TABLE_MAIN or flags & rt.RTM_F_CLONED:
            return
        if length == 0 or (self._asked and self._leads_there(heard, length)):
            pending.host = True
        if length == 0 or (pending.host and pending.ours):
            return
        found = attributes(heard.datagram, heard.start + rt.RTMSG.size, heard.end)
        if rt.RTA_GATEWAY not in found and followed.carries_ours(self._name(number(found.get(rt.RTA_OIF)))):
            pending.host = True  # what can be reached there without a gateway
        if not pending.ours:
            base = found.get(rt.RTA_DST, b"")
            # One who puts his route in the place of ours is heard of by his route only. At a wanted
            # destination one may come beside ours, or one that keeps ours away may go.
            pending.ours = followed.inside.network(base, length) and (
                protocol == ROUTE_PROTOCOL
                or bool(heard.flags & NLM_F_REPLACE)
                or rt.network(base, length) in followed.want.routes
            )

    def _leads_there(self, heard: Notification, length: int) -> bool:
        found = attributes(heard.datagram, heard.start + rt.RTMSG.size, heard.end)
        there = rt.Inside((rt.network(found.get(rt.RTA_DST, b""), length),))
        return any(there.address(packed) for packed in self._asked)

    def _nexthop(self, pending: _Pending, followed: Followed, heard: Notification) -> None:
        """By the id alone: who replaces one of ours writes his protocol into it."""
        found = attributes(heard.datagram, heard.start + rt.NHMSG.size, heard.end)
        pending.ours = pending.ours or number(found.get(rt.NHA_ID)) in followed.nexthop_ids


def _neighbour_touched(dev: str, state: int, heard: Notification, want: State) -> bool:
    found = attributes(heard.datagram, heard.start + rt.NDMSG.size, heard.end)
    if heard.kind == rt.RTM_DELNEIGH:
        return True
    mac = want.neighs.get((dev, rt.address(found.get(rt.NDA_DST, b""))))
    if mac is None:
        # The kernel resolving an address by itself; a deletion says RTM_DELNEIGH as well.
        return state not in (rt.NUD_INCOMPLETE, rt.NUD_FAILED)
    return state != rt.NUD_PERMANENT or found.get(rt.NDA_LLADDR, b"").hex(":") != mac


def _fdb_touched(dev: str, state: int, heard: Notification, want: State) -> bool:
    found = attributes(heard.datagram, heard.start + rt.NDMSG.size, heard.end)
    wanted = want.fdb.get((dev, found.get(rt.NDA_LLADDR, b"").hex(":")))
    permanent = bool(state & rt.NUD_PERMANENT)
    if wanted is None:
        # Our own deletions are heard of, as are entries that the kernel learnt.
        return permanent and heard.kind == rt.RTM_NEWNEIGH
    stands = heard.kind == rt.RTM_NEWNEIGH and permanent
    return not stands or found.get(rt.NDA_DST) != wanted.packed


def _destination(heard: Notification) -> bytes:
    """The packed address of a neighbour message."""
    return attributes(heard.datagram, heard.start + rt.NDMSG.size, heard.end).get(rt.NDA_DST, b"")
