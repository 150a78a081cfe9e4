"""Neighbours and FDB entries as the kernel dumps them (linux/neighbour.h)."""

from __future__ import annotations

from flanneld_py.addresses import IPAddress
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.netlink import U32, NetlinkSocket, attribute, attributes
from flanneld_py.drivers.oddrows import NOT_ONE_GATEWAY, ODD_FDB_ATTRIBUTES

ETHERNET_GROUP_BIT = 0x01


def read_fdb(
    netlink: NetlinkSocket, index: int, dev: str
) -> tuple[dict[tuple[str, str], IPAddress], set[tuple[str, str]]]:
    """The permanent entries of a vxlan device: device and MAC → where to; keys of other than one destination.

    Raises:
        KernelError: see `NetlinkSocket.dump`.
    """
    fdb: dict[tuple[str, str], IPAddress] = {}
    odd: set[tuple[str, str]] = set()
    body = rt.NDMSG.pack(rt.AF_BRIDGE, index, 0, 0, 0)
    for datagram, start, end in netlink.dump("FDB entries", rt.RTM_GETNEIGH, body):
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
            odd.add(key)
        elif rt.NDA_DST in found:
            fdb[key] = rt.address(found[rt.NDA_DST])
    return fdb, odd


def read_neighbours(
    netlink: NetlinkSocket, index: int, dev: str, inside: rt.Inside
) -> dict[tuple[str, IPAddress], str]:
    """The permanent neighbours on a device, of addresses inside some networks: device and address → MAC.

    Raises:
        KernelError: see `NetlinkSocket.dump`.
    """
    neighbours: dict[tuple[str, IPAddress], str] = {}
    body = rt.NDMSG.pack(rt.AF_UNSPEC, 0, 0, 0, 0) + attribute(rt.NDA_IFINDEX, U32.pack(index))
    for datagram, start, end in netlink.dump("neighbours", rt.RTM_GETNEIGH, body):
        _, owner, state, _, _ = rt.NDMSG.unpack_from(datagram, start)
        if owner != index or state != rt.NUD_PERMANENT:
            continue
        found = attributes(datagram, start + rt.NDMSG.size, end)
        destination, mac = found.get(rt.NDA_DST, b""), found.get(rt.NDA_LLADDR, b"")
        if len(mac) == 6 and inside.address(destination):
            neighbours[dev, rt.address(destination)] = mac.hex(":")
    return neighbours
