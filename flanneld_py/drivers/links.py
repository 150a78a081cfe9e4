"""Links and addresses as the kernel dumps them (linux/if_link.h, linux/if_addr.h)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Literal

from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.netlink import U32, NetlinkSocket, attributes
from flanneld_py.model import AddressFacts, Family

IFF_UP = 0x1
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_SECONDARY, IFA_F_DEPRECATED, IFA_F_PERMANENT = 0x01, 0x20, 0x80
SCOPES: dict[int, Literal["global", "link", "host"]] = {0: "global", 253: "link", 254: "host"}
"""RT_SCOPE_* of linux/rtnetlink.h; the numbers between them are for sites to use."""


@dataclass(frozen=True, slots=True)
class Device:
    """A link as dumped."""

    index: int
    name: str
    up: bool
    mtu: int
    mac: str
    kind: str
    alias: str
    info: dict[int, bytes]
    """The kind's own attributes, IFLA_INFO_DATA."""


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
        mtu=number(found.get(rt.IFLA_MTU)),
        mac=found.get(rt.IFLA_ADDRESS, b"").hex(":"),
        kind=text(info.get(rt.IFLA_INFO_KIND, b"")),
        alias=text(found.get(rt.IFLA_IFALIAS, b"")),
        info=nested(info.get(rt.IFLA_INFO_DATA, b"")),
    )


def nested(payload: bytes) -> dict[int, bytes]:
    return attributes(payload, 0, len(payload))


def text(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode(errors="backslashreplace")


def number(payload: bytes | None) -> int:
    """A u32, 0 when it is not there."""
    return int(U32.unpack(payload)[0]) if payload else 0


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


def read_default_device(netlink: NetlinkSocket, family: Family, names: dict[int, str]) -> str | None:
    """Device of the first default route of table main that can carry packets now."""
    request = rt.RTMSG.pack(rt.AF[family], 0, 0, 0, rt.RT_TABLE_MAIN, 0, 0, rt.RTN_UNICAST, 0)
    for datagram, start, end in netlink.dump("routes", rt.RTM_GETROUTE, request, rt.NO_ROUTES):
        if datagram[start] != rt.AF[family] or datagram[start + 1] != 0:
            continue  # not of this family, or longer than a default route
        flags = rt.RTMSG.unpack_from(datagram, start)[-1]
        found = attributes(datagram, start + rt.RTMSG.size, end)
        hops = _multipath(found[rt.RTA_MULTIPATH]) if rt.RTA_MULTIPATH in found else []
        if rt.RTA_OIF in found:
            hops = [(flags, number(found[rt.RTA_OIF]))]
        for hop_flags, index in hops:
            if not hop_flags & (rt.RTNH_F_DEAD | rt.RTNH_F_LINKDOWN) and index in names:
                return names[index]
    return None


def _multipath(payload: bytes) -> list[tuple[int, int]]:
    """Flags and device index of each hop in an RTA_MULTIPATH."""
    hops, offset = [], 0
    while offset + rt.RTNEXTHOP.size <= len(payload):
        length, flags, _, index = rt.RTNEXTHOP.unpack_from(payload, offset)
        hops.append((flags, index))
        offset += max(length + 3 & ~3, rt.RTNEXTHOP.size)
    return hops
