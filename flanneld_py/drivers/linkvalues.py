"""Devices of overlays as values, and the arguments that change one into another (linux/if_link.h)."""

from __future__ import annotations

import socket
from typing import Any

from flanneld_py.datapath import TunLink
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.links import Device, device_name, number
from flanneld_py.model import (
    Link,
    VxlanLink,
)

IFLA_VXLAN_ID, IFLA_VXLAN_LINK, IFLA_VXLAN_LOCAL, IFLA_VXLAN_LEARNING = 1, 3, 4, 7
IFLA_VXLAN_PORT, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_GBP = 15, 17, 23


def link_of(device: Device) -> Link:
    if device.kind == "tun":
        return TunLink(device.mtu, device.alias, device.up, device.queue)
    return vxlan_of(device)


def vxlan_of(device: Device) -> VxlanLink:
    info = device.info
    local = info.get(IFLA_VXLAN_LOCAL) or info.get(IFLA_VXLAN_LOCAL6) or bytes(4)
    return VxlanLink(
        vni=number(info.get(IFLA_VXLAN_ID)),
        port=int.from_bytes(info.get(IFLA_VXLAN_PORT, b""), "big"),
        dev=device_name(number(info.get(IFLA_VXLAN_LINK))),  # empty: none, or one of another namespace
        local=rt.address(local),
        mtu=device.mtu,
        mac=device.mac,
        alias=device.alias,
        learning=any(info.get(IFLA_VXLAN_LEARNING, b"")),
        gbp=IFLA_VXLAN_GBP in info,
        up=device.up,
    )


def changes(have: Link, want: Link) -> dict[str, dict[str, Any]]:
    """What differs → the arguments that set it, in the order in which to do it."""
    found: dict[str, dict[str, Any]] = {}
    if have.alias != want.alias:
        found["alias"] = {"ifalias": want.alias}
    if isinstance(have, VxlanLink) and isinstance(want, VxlanLink):
        found |= _vxlan_changes(have, want)
    if have.mtu != want.mtu:
        found["MTU"] = {"mtu": want.mtu}
    if isinstance(have, TunLink) and isinstance(want, TunLink) and have.queue != want.queue:
        found["queue"] = {"txqlen": want.queue}
    if have.up != want.up:
        found["state"] = {"state": "up" if want.up else "down"}
    return found


def _vxlan_changes(have: VxlanLink, want: VxlanLink) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if have.local != want.local:
        found["local address"] = {"kind": "vxlan", local_key(want): str(want.local)}
    if have.learning != want.learning:
        found["learning"] = {"kind": "vxlan", "vxlan_learning": want.learning}
    if have.dev != want.dev:
        found["underlying device"] = {"kind": "vxlan", "vxlan_link": socket.if_nametoindex(want.dev)}
    if have.mac != want.mac:
        found["MAC"] = {"address": want.mac}
    return found


def local_key(want: VxlanLink) -> str:
    return "vxlan_local" if want.local.version == 4 else "vxlan_local6"
