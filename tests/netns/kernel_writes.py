"""What a process told the kernel to change, from strace's dump of every byte that it sent.

strace's own decoding is not relied on: it gives up where it cannot learn a socket's protocol. The messages
are taken apart here, by linux/netlink.h and linux/rtnetlink.h.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

CALLS = "sendto,sendmsg,sendmmsg,write,writev,openat,ioctl,setsockopt"
STRACE = ("--seccomp-bpf", "-yy", "--string-limit=0", f"--trace={CALLS}", "--write=all")
"""Options for strace, besides -f and -o."""

_CALL = re.compile(r"^\d+ +(\w+)\((.*)")
_RESUMED = re.compile(r"^\d+ +<\.\.\. \w+ resumed>")
_DUMP = re.compile(r"^ \| [0-9a-f]{5,}  ([0-9a-f ]{48})")
_CHANGING_OPTION = re.compile(r"\b(IP6?T_SO_SET_REPLACE)\b")
"""How legacy iptables hands a table over (linux/netfilter_ipv4/ip_tables.h)."""
_CHANGING_IOCTL = re.compile(r"\b(SIOC(?:ADD|DEL|S)[A-Z0-9]+|SIOCBR[A-Z]+)\b")
_HEADER = struct.Struct("=IHHII")
_RTM_BASE = 16
_ACTIONS = ("set", "del", "get", "set")
"""RTM_NEW…, RTM_DEL…, RTM_GET…, RTM_SET…: by twos, the lowest bits of a message type."""


class Shape(NamedTuple):
    """A family of message types: what it is about, and the size of its fixed body."""

    noun: str
    body: int


_SHAPES = {
    16: Shape("link", 16),  # struct ifinfomsg
    20: Shape("address", 8),  # struct ifaddrmsg
    24: Shape("route", 12),  # struct rtmsg
    28: Shape("neigh", 12),  # struct ndmsg
    104: Shape("nexthop", 8),  # struct nhmsg
}
_AF_BRIDGE = 7
_NFTABLES = 10
"""NFNL_SUBSYS_NFTABLES (linux/netfilter/nfnetlink.h)."""
_NFT_GETS = frozenset((1, 4, 7, 10, 13, 16, 19, 21, 23, 25))
"""NFT_MSG_GET…"""


class Write(NamedTuple):
    """One change asked for, whether or not the kernel agreed."""

    line: str
    """As `set route 10.5.2.0/24`, `del nexthop 7`, `set fdb 02:00:00:00:00:01`, `open /proc/sys/…`."""
    datagram: int
    """The send that carried it: those with the same number went together."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole run of a process."""

    reads: int
    """RTM_GET… messages: without any, the trace saw nothing at all."""
    writes: list[Write]

    @property
    def lines(self) -> list[str]:
        return [write.line for write in self.writes]


def kernel_writes(trace: Path) -> Trace:
    """Read what strace wrote with the options STRACE."""
    reads, writes = 0, []
    for number, (call, sent) in enumerate(_calls(trace)):
        if sent:
            for action, subject in _messages(sent):
                if action == "get":
                    reads += 1
                else:
                    writes.append(Write(f"{action} {subject}", number))
        elif change := _other_change(call):
            writes.append(Write(change, number))
    return Trace(reads, writes)


def _calls(trace: Path) -> Iterator[tuple[str, bytes]]:
    """Each system call's line; for one on a netlink socket with the bytes that were sent.

    Bytes follow the line that a call returned on; strace prints both in one go.
    """
    begun: dict[str, str] = {}
    call, sent = "", bytearray()
    with trace.open(errors="replace") as lines:
        for line in lines:
            if dump := _DUMP.match(line):
                sent += bytes.fromhex(dump[1])
                continue
            if line.startswith(" "):
                continue  # " * 52 bytes in buffer 0"
            if call:
                yield call, _on_netlink(call, sent)
            call, sent = "", bytearray()
            pid = line.partition(" ")[0]
            if "<unfinished ...>" in line:
                begun[pid] = line
            elif _RESUMED.match(line):
                call = begun.pop(pid, "")
            elif _CALL.match(line):
                call = line
    if call:
        yield call, _on_netlink(call, sent)


def _on_netlink(call: str, sent: bytearray) -> bytes:
    return bytes(sent) if "<NETLINK:" in call.partition(">")[0] else b""


def _other_change(call: str) -> str:
    """A sysctl opened for writing, or an ioctl that changes an interface or a route; else nothing."""
    match = _CALL.match(call)
    if match is None:
        return ""
    name, arguments = match.groups()
    if name == "openat" and '"/proc/sys/' in arguments and re.search(r"O_WRONLY|O_RDWR", arguments):
        return f"open {arguments.split(chr(34))[1]}"
    if name == "setsockopt" and (option := _CHANGING_OPTION.search(arguments)):
        return f"setsockopt {option[1]}"
    if name == "ioctl" and (request := _CHANGING_IOCTL.search(arguments)):
        return f"ioctl {request[1]}"
    return ""


def _frames(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each message."""
    start = 0
    while start + _HEADER.size <= len(datagram):
        length, kind, *_ = _HEADER.unpack_from(datagram, start)
        if length < _HEADER.size:
            return  # what iproute2 pads its dump requests with
        yield kind, datagram[start + _HEADER.size : start + length]
        start += length + 3 & ~3


def _messages(datagram: bytes) -> Iterator[tuple[str, str]]:
    """Action and subject of each message."""
    frames = list(_frames(datagram))
    of_filter = [kind & 0xFF for kind, _ in frames if kind >> 8 == _NFTABLES]
    for kind in of_filter:
        yield "get" if kind in _NFT_GETS else "set", "packet filter"
    if of_filter:
        return  # what else there is begins and ends the transaction
    for kind, content in frames:
        if kind >= _RTM_BASE:
            yield _ACTIONS[kind & 3], _subject(kind & ~3, content)


def _subject(family: int, message: bytes) -> str:
    shape = _SHAPES.get(family, Shape(f"type {family}", len(message)))
    body, found = message[: shape.body], _attributes(message[shape.body :])
    match shape.noun:
        case "link":  # IFLA_IFNAME 3, IFLA_IFALIAS 20
            name, alias = (found.get(kind, b"").rstrip(b"\0").decode() for kind in (3, 20))
            which = name or str(struct.unpack_from("=i", body, 4)[0])
            which += f" alias {alias}" if alias else ""
        case "address":  # IFA_ADDRESS 1, IFA_LOCAL 2
            which = f"{_address(found.get(2) or found.get(1))}/{body[1]}"
        case "route":  # RTA_DST 1
            which = f"{_address(found.get(1))}/{body[1]}"
        case "neigh" if body[0] == _AF_BRIDGE:  # NDA_LLADDR 2
            return f"fdb {found.get(2, b'').hex(':')}"
        case "neigh":  # NDA_DST 1
            which = _address(found.get(1))
        case "nexthop":  # NHA_ID 1, NHA_GATEWAY 6
            which = (
                _address(found[6]) if 6 in found else str(int.from_bytes(found.get(1, b""), sys.byteorder))
            )
        case _:
            which = ""
    return f"{shape.noun} {which}".strip()


def _attributes(payload: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(payload) >= 4:
        length, kind = struct.unpack_from("=HH", payload)
        if length < 4:
            break
        found[kind & 0x3FFF] = payload[4:length]
        payload = payload[length + 3 & ~3 :]
    return found


def _address(packed: bytes | None) -> str:
    return str(ip_address(packed)) if packed else "default"
