"""Sockets to send by: see struct pump in ways.h."""

from __future__ import annotations

import _socket
import struct
from array import array

LANES = 32
SO_ATTACH_REUSEPORT_CBPF, SO_SNDBUFFORCE = 51, 32
ALL_TO_THE_FIRST = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""BPF_RET | BPF_K with 0, a struct sock_filter: every packet is for the first socket of a group."""
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
UDP_GRO = 104


def attach(udp: _socket.socket) -> None:
    """Let other sockets of its address and port leave all packets to this one, which has SO_REUSEPORT.

    Raises:
        OSError: it was bound without this program, so it never will lead; or the kernel has none such.
    """
    program = array("B", ALL_TO_THE_FIRST)
    fprog = struct.pack("@HP", 1, program.buffer_info()[0])
    udp.setsockopt(_socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, fprog)


def open_lanes(udp: _socket.socket, *, gro: bool) -> list[_socket.socket]:
    """LANES of them; `udp` itself where the kernel allows no others."""
    lanes: list[_socket.socket] = []
    udp.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT, 1)
    try:
        attach(udp)
        while len(lanes) < LANES:
            lanes.append(_open(udp, gro=gro))
    except OSError:
        pass
    finally:
        udp.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT, 0)  # as it was
    return lanes + [udp] * (LANES - len(lanes))


def _open(udp: _socket.socket, *, gro: bool) -> _socket.socket:
    lane = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    size = udp.getsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF) // 2  # the kernel doubles what it is given
    try:
        lane.setsockopt(_socket.SOL_SOCKET, SO_SNDBUFFORCE, size)
    except PermissionError:
        lane.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, size)
    lane.setsockopt(_socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    if gro:
        lane.setsockopt(_socket.SOL_UDP, UDP_GRO, 1)
    lane.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT, 1)
    lane.bind(udp.getsockname())
    return lane
