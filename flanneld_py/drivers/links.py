"""Links, addresses and routes as the kernel dumps them (linux/{if_link,if_addr,rtnetlink}.h)."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from ipaddress import ip_interface
from typing import Literal, NamedTuple

from msgspec import Struct

from flanneld_py.addresses import Family, IPNetwork
from flanneld_py.core.ownership import FIRST_MARK_BIT, link_alias
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.netlink import U32, NetlinkSocket, attributes, understanding
from flanneld_py.model import NEXTHOP_PROTOCOL, AddressFacts, NextHop

IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_SECONDARY, IFA_F_DEPRECATED, IFA_F_PERMANENT = 0x01, 0x20, 0x80
SCOPES: dict[int, Literal["global", "link", "host"]] = {0: "global", 253: "link", 254: "host"}
"""RT_SCOPE_* of linux/rtnetlink.h; the numbers between them are for sites to use."""


class Device(Struct, frozen=True):
    """A link as dumped."""

    index: int
    name: str
    up: bool
    carrier: bool
    mtu: int
    mac: str
    kind: str
    alias: str
    queue: int
    """Packets: txqueuelen."""
    info: dict[int, bytes]
    """The kind's own attributes, IFLA_INFO_DATA."""


class RouteMark(NamedTuple):
    """What tells the routes to one destination apart."""

    protocol: int
    tos: int
    metric: int


class FoundRoute(NamedTuple):
    """A route of table main as dumped."""

    base: bytes
    length: int
    mark: RouteMark
    hop: NextHop | None
    """Where it leads, if the kernel shows one gateway or device."""
    dev: str
    """Empty: several, or shown by the nexthop object only."""
    index_of_dev: int
    """0 as before."""
    nexthop: int
    """Id of its nexthop object; 0: none."""
    kind: int = rt.RTN_UNICAST
    """RTN_* of linux/rtnetlink.h."""
    lock: int = 0
    """RTAX_LOCK: in its upper bits the mark of one of ours."""

    @property
    def destination(self) -> IPNetwork:
        return rt.network(self.base, self.length)

    @property
    def is_usual(self) -> bool:
        """Whether it stands where one of ours would."""
        return self.mark[1:] == (0, rt.METRIC[4 if len(self.base) == 4 else 6])

    @property
    def is_blackhole(self) -> bool:
        """Whether it is one of ours that drop what no better route takes."""
        return self.kind == rt.RTN_BLACKHOLE and self.mark[1:] == (0, rt.BLACKHOLE_METRIC)

    def is_anothers(self, mark: int) -> bool:
        """Whether it bears the mark of another daemon than that of `mark` (core/ownership.route_mark)."""
        return self.lock >> FIRST_MARK_BIT << FIRST_MARK_BIT not in (0, mark)

    def describe(self) -> str:
        """As `ip route` would, with a space before: ` via 192.0.2.77 dev eth0 proto static`."""
        gateway = self.hop.via if self.hop else None
        via = f" via {gateway}" if gateway else f" nhid {self.nexthop}" if self.nexthop else ""
        dev = f" dev {self.dev}" if self.dev else ""
        return f"{via}{dev} proto {rt.PROTOCOLS.get(self.mark.protocol, self.mark.protocol)}"


KINDS = tuple(rt.LINKS_OF_KIND)
"""Of the devices that overlays are made of."""


def read_overlay_devices(netlink: NetlinkSocket) -> list[Device]:
    """The links of KINDS: ours, and others'."""
    return [device for request in rt.LINKS_OF_KIND.values() for device in read_devices(netlink, request)]


@understanding("links")
def read_devices(netlink: NetlinkSocket, request: bytes = rt.ALL_LINKS) -> list[Device]:
    """All links, or those that a dump request's body selects."""
    rows = netlink.dump("links", rt.RTM_GETLINK, request)
    return [_device(*row) for row in rows]


def _device(datagram: bytes, start: int, end: int) -> Device:
    _, _, index, flags, _ = rt.IFINFOMSG.unpack_from(datagram, start)
    found = attributes(datagram, start + rt.IFINFOMSG.size, end)
    info = nested(found.get(rt.IFLA_LINKINFO, b""))
    return Device(
        index=index,
        name=text(found.get(rt.IFLA_IFNAME, b"")),
        up=bool(flags & IFF_UP),
        carrier=bool(flags & IFF_LOWER_UP),
        mtu=number(found.get(rt.IFLA_MTU)),
        mac=found.get(rt.IFLA_ADDRESS, b"").hex(":"),
        kind=text(info.get(rt.IFLA_INFO_KIND, b"")),
        alias=text(found.get(rt.IFLA_IFALIAS, b"")),
        queue=number(found.get(rt.IFLA_TXQLEN)),
        info=nested(info.get(rt.IFLA_INFO_DATA, b"")),
    )


def nested(payload: bytes) -> dict[int, bytes]:
    return attributes(payload, 0, len(payload))


def text(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode(errors="backslashreplace")


def number(payload: bytes | None) -> int:
    """A u32, 0 when it is not there."""
    return int(U32.unpack(payload)[0]) if payload else 0


def device_name(index: int) -> str:
    """The name of a device as `read_devices` writes it; empty if there is none in this namespace."""
    try:
        return text(os.fsencode(socket.if_indextoname(index)))
    except (OSError, OverflowError):  # the latter for a negative number
        return ""


class OwnDevices:
    """Tells our devices from those of others.

    Ours bear the alias of our etcd prefix. One that this process saw with it stays ours also when somebody
    has written another alias over it, unless that is the mark of another daemon; a process that starts later
    cannot know.
    """

    def __init__(self, prefix: str) -> None:
        self.alias = link_alias(prefix)
        self._seen: set[int] = set()

    def look(self, devices: Iterable[Device]) -> None:
        """Take note of all devices of KINDS that there are."""
        self._seen = {device.index for device in devices if self.is_ours(device)}

    def is_ours(self, device: Device) -> bool:
        if device.alias == self.alias:
            return True
        return device.index in self._seen and device.kind in KINDS and not is_marked(device.alias)


class Claims(NamedTuple):
    """What tells our nexthop objects from those of another prefix that has the same range of ids.

    One that nobody uses and that stands on no daemon's device is taken for ours: a daemon that dies between
    two writes leaves it behind, and the other one makes its own anew.
    """

    used: AbstractSet[int]
    """Ids of routes of ours, and those we gave ourselves, whatever was made of them since."""
    of_others: AbstractSet[int]
    """Ids that only routes outside our Networks use."""
    devices_of_others: AbstractSet[int]
    """Indexes of the devices that bear another daemon's mark."""

    def cover(self, ident: int, protocol: int, device: int) -> bool:
        if ident in self.of_others or device in self.devices_of_others:
            return False
        return ident in self.used or protocol == NEXTHOP_PROTOCOL


def is_marked(alias: str) -> bool:
    """Whether it is the mark of some daemon's device."""
    return alias.startswith(link_alias(""))


@understanding("addresses")
def read_addresses(netlink: NetlinkSocket) -> dict[int, list[AddressFacts]]:
    """Index of the link → its addresses of both families."""
    addresses: dict[int, list[AddressFacts]] = defaultdict(list)
    request = rt.IFADDRMSG.pack(rt.AF_UNSPEC, 0, 0, 0, 0)
    for datagram, start, end in netlink.dump("addresses", rt.RTM_GETADDR, request):
        family, length, flags, scope, index = rt.IFADDRMSG.unpack_from(datagram, start)
        found = attributes(datagram, start + rt.IFADDRMSG.size, end)
        # With a peer (point to point) IFA_ADDRESS is the other end's, IFA_LOCAL ours.
        packed = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
        if packed is None or family not in rt.AF.values():
            continue
        flags = number(found.get(IFA_FLAGS)) or flags
        addresses[index].append(
            AddressFacts(
                address=ip_interface((packed, length)),
                scope=SCOPES.get(scope, "site"),
                deprecated=bool(flags & IFA_F_DEPRECATED),
                permanent=bool(flags & IFA_F_PERMANENT),
                secondary=bool(flags & IFA_F_SECONDARY),
            )
        )
    return addresses


def read_main_routes(
    netlink: NetlinkSocket, family: Family, name_of: Callable[[int], str], protocol: int = 0, kind: int = 0
) -> Iterator[FoundRoute]:
    """The routes of table main, all or of one protocol, all or of one type."""
    request = rt.RTMSG.pack(rt.AF[family], 0, 0, 0, rt.RT_TABLE_MAIN, protocol, 0, kind, 0)
    for datagram, start, end in netlink.dump("routes", rt.RTM_GETROUTE, request, rt.NO_ROUTES):
        owner, length, _, tos, _, made_by, _, type_, flags = rt.RTMSG.unpack_from(datagram, start)
        found = attributes(datagram, start + rt.RTMSG.size, end)
        if owner != rt.AF[family] or protocol not in (0, made_by) or rt.RTA_DST not in found:
            continue
        index = number(found.get(rt.RTA_OIF))
        hop = None
        nexthop = number(found.get(rt.RTA_NH_ID))
        if type_ == rt.RTN_UNICAST and rt.RTA_GATEWAY in found and index:
            via = rt.address(found[rt.RTA_GATEWAY])
            hop = NextHop(name_of(index), via, bool(flags & rt.RTNH_F_ONLINK))
        elif type_ == rt.RTN_UNICAST and index and not nexthop and rt.RTA_VIA not in found:
            hop = NextHop(name_of(index), None, onlink=False)
        mark = RouteMark(made_by, tos, number(found.get(rt.RTA_PRIORITY)))
        dev = name_of(index) if index else ""
        metrics = found.get(rt.RTA_METRICS)
        lock = number(nested(metrics).get(rt.RTAX_LOCK)) if metrics else 0
        yield FoundRoute(found[rt.RTA_DST], length, mark, hop, dev, index, nexthop, type_, lock)
