"""What the routes of table main tell about this host, and the way to one address (linux/rtnetlink.h)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from msgspec import Struct, field

from flanneld_py.addresses import Family, IPAddress, IPNetwork
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.links import device_name, number
from flanneld_py.drivers.netlink import Failure, NetlinkSocket, attribute, attributes, understanding
from flanneld_py.model import ROUTE_PROTOCOL, Way

RTA_PREFSRC, RTA_VIA = 7, 18
VIA_FAMILY_SIZE = 2
"""struct rtvia begins with the address family."""
NOWHERE = rt.RTNH_F_DEAD | rt.RTNH_F_LINKDOWN


class MainRoutes(Struct):
    """Table main of one family, as far as it concerns the choice of an interface."""

    default: tuple[str, ...] = ()
    """Devices of the first default route that can carry packets now."""
    gateways: set[IPAddress] = field(default_factory=set)
    """Next hops of all default routes."""
    onlink: dict[str, list[IPNetwork]] = field(default_factory=lambda: defaultdict(list))
    """Device → what is reached through it without a gateway."""


@understanding("routes")
def read_main(netlink: NetlinkSocket, family: Family, names: dict[int, str]) -> MainRoutes:
    """Read the table; `names`: index → name of the devices there are."""
    main = MainRoutes()
    request = rt.RTMSG.pack(rt.AF[family], 0, 0, 0, rt.RT_TABLE_MAIN, 0, 0, rt.RTN_UNICAST, 0)
    for datagram, start, end in netlink.dump("routes", rt.RTM_GETROUTE, request, rt.NO_ROUTES):
        owner, length, _, _, _, protocol, _, _, flags = rt.RTMSG.unpack_from(datagram, start)
        if owner != rt.AF[family] or protocol == ROUTE_PROTOCOL:
            continue  # ours, of which there may be thousands
        found = attributes(datagram, start + rt.RTMSG.size, end)
        base = found.get(rt.RTA_DST, bytes(4 if family == 4 else 16))
        hops = list(_hops(found, flags))
        for _, index, via in hops:
            if via is None and index in names:
                main.onlink[names[index]].append(rt.network(base, length))
        if length == 0:
            main.gateways.update(via for _, _, via in hops if via is not None)
            alive = (names[index] for dead, index, _ in hops if not dead & NOWHERE and index in names)
            main.default = main.default or tuple(dict.fromkeys(alive))
    return main


@understanding("a route")
def look_up(netlink: NetlinkSocket, destination: IPAddress) -> Way | None:
    """How packets to an address would leave this host; None: not at all.

    An address of this host itself is reached by the loopback interface.

    Raises:
        KernelError: the kernel did not answer, or not so that it makes sense.
    """
    body = rt.RTMSG.pack(rt.AF[_family(destination)], destination.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    answer = netlink.ask(rt.RTM_GETROUTE, body + attribute(rt.RTA_DST, destination.packed))
    if isinstance(answer, Failure):
        return None  # ENETUNREACH and the like
    datagram, start, end = answer
    kind = rt.RTMSG.unpack_from(datagram, start)[7]
    found = attributes(datagram, start + rt.RTMSG.size, end)
    dev = device_name(number(found.get(rt.RTA_OIF)))
    if kind not in (rt.RTN_UNICAST, rt.RTN_LOCAL) or not dev:
        return None
    source = found.get(RTA_PREFSRC)
    return Way(dev, rt.address(source) if source else None)


def _hops(found: dict[int, bytes], flags: int) -> Iterator[tuple[int, int, IPAddress | None]]:
    """Flags, device index and gateway of each hop of a route."""
    if rt.RTA_OIF in found:
        yield flags, number(found[rt.RTA_OIF]), _gateway(found)
        return
    payload = found.get(rt.RTA_MULTIPATH, b"")
    offset = 0
    while offset + rt.RTNEXTHOP.size <= len(payload):
        length, hop_flags, _, index = rt.RTNEXTHOP.unpack_from(payload, offset)
        yield hop_flags, index, _gateway(attributes(payload, offset + rt.RTNEXTHOP.size, offset + length))
        offset += max(length + 3 & ~3, rt.RTNEXTHOP.size)


def _gateway(found: dict[int, bytes]) -> IPAddress | None:
    packed = found.get(rt.RTA_GATEWAY) or found.get(RTA_VIA, b"")[VIA_FAMILY_SIZE:]
    return rt.address(packed) if packed else None


def _family(address: IPAddress) -> Family:
    return 4 if address.version == 4 else 6
