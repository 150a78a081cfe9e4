"""The few rtnetlink messages that make, change and delete devices and their addresses, as bytes.

Made here, as a library for that costs a start 100 ms and 25 MB. Numbers: linux/if_link.h, linux/if_addr.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple

from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.linkvalues import (
    IFLA_VXLAN_GBP,
    IFLA_VXLAN_ID,
    IFLA_VXLAN_LEARNING,
    IFLA_VXLAN_LINK,
    IFLA_VXLAN_LOCAL,
    IFLA_VXLAN_LOCAL6,
    IFLA_VXLAN_PORT,
)
from flanneld_py.drivers.netlink import NLM_F_CREATE, NLM_F_EXCL, U32, attribute, message

IFF_UP = 1
IFLA_TXQLEN = 13
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8


class Request(NamedTuple):
    """One message: which object, what to do, and the fields, by the names that `ip` has for them."""

    what: Literal["link", "addr"]
    verb: Literal["add", "set", "del"]
    arguments: dict[str, Any]


def encode(request: Request) -> bytes:
    """As it goes to the kernel, without asking for an acknowledgement.

    Raises:
        KeyError: there is no such field.
    """
    made = _link if request.what == "link" else _address
    return made(request.verb, dict(request.arguments))


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _packed(value: str) -> bytes:
    return ip_address(value).packed


def _flag(value: bool) -> bytes:
    return bytes([value])


_FIELDS: Mapping[str, tuple[int, Callable[[Any], bytes]]] = {
    "ifname": (rt.IFLA_IFNAME, _text),
    "ifalias": (rt.IFLA_IFALIAS, _text),
    "mtu": (rt.IFLA_MTU, U32.pack),
    "address": (rt.IFLA_ADDRESS, rt.mac_bytes),
    "txqlen": (IFLA_TXQLEN, U32.pack),
}
_VXLAN: Mapping[str, tuple[int, Callable[[Any], bytes]]] = {
    "vxlan_id": (IFLA_VXLAN_ID, U32.pack),
    "vxlan_link": (IFLA_VXLAN_LINK, U32.pack),
    "vxlan_local": (IFLA_VXLAN_LOCAL, _packed),
    "vxlan_local6": (IFLA_VXLAN_LOCAL6, _packed),
    "vxlan_port": (IFLA_VXLAN_PORT, struct.Struct(">H").pack),
    "vxlan_learning": (IFLA_VXLAN_LEARNING, _flag),
    "vxlan_gbp": (IFLA_VXLAN_GBP, lambda _: b""),
}
_VERBS = {
    "add": (rt.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL),
    "set": (rt.RTM_NEWLINK, 0),
    "del": (rt.RTM_DELLINK, 0),
}


def _link(verb: str, arguments: dict[str, Any]) -> bytes:
    state = arguments.pop("state", None)
    flags, changed = (IFF_UP if state == "up" else 0), (IFF_UP if state else 0)
    body = rt.IFINFOMSG.pack(rt.AF_UNSPEC, 0, arguments.pop("index"), flags, changed)
    kind = arguments.pop("kind", None)
    data = b"".join(_attributes(_VXLAN, arguments, pop=True))
    body += b"".join(_attributes(_FIELDS, arguments))
    if kind is not None:
        info = attribute(rt.IFLA_INFO_KIND, _text(kind)) + attribute(rt.IFLA_INFO_DATA, data)
        body += attribute(rt.IFLA_LINKINFO, info)
    number, flags = _VERBS[verb]
    return message(number, flags, body)


def _attributes(
    fields: Mapping[str, tuple[int, Callable[[Any], bytes]]], arguments: dict[str, Any], *, pop: bool = False
) -> list[bytes]:
    """Of the arguments those that `fields` knows; all of them must be known unless they are popped."""
    names = [name for name in arguments if not pop or name in fields]
    found = [attribute(fields[name][0], fields[name][1](arguments[name])) for name in names]
    for name in names if pop else ():
        del arguments[name]
    return found


def _address(verb: str, arguments: dict[str, Any]) -> bytes:
    packed = _packed(arguments["address"])
    flags = arguments.get("flags", 0)
    family = rt.AF[4 if len(packed) == 4 else 6]
    body = rt.IFADDRMSG.pack(family, arguments["prefixlen"], 0, 0, arguments["index"])
    body += attribute(IFA_ADDRESS, packed)
    if len(packed) == 4:
        body += attribute(IFA_LOCAL, packed)
    if flags:
        body += attribute(IFA_FLAGS, U32.pack(flags))
    if verb == "add":
        return message(rt.RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body)
    return message(rt.RTM_DELADDR, 0, body)
