"""Notifications of what we write ourselves, kept by the kernel from a socket that listens to what others do.

With ten thousand peers a start is heard of in forty thousand messages, which would be read in its midst.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Collection

from flanneld_py.drivers import rtmessages as rt

SO_ATTACH_FILTER = 26
"""asm-generic/socket.h."""
LOAD_WORD, LOAD_HALF, JUMP_IF_EQUAL, RETURN = 0x20, 0x28, 0x15, 0x06
"""Classic BPF (linux/bpf_common.h): words are loaded in network order, whatever the host's is."""
INSTRUCTION = struct.Struct("=HBBI")
"""Code, instructions to skip when true, and when false, constant."""
TYPE_AT, PORT_AT, STATE_AT = 4, 12, 24
"""Of nlmsghdr, and of the ndmsg behind it."""
ALL, NONE = 0xFFFF_FFFF, 0
MOST_PORTS = 100


def drop_own(sock: socket.socket, ports: Collection[int]) -> None:
    """Let through what others than these netlink ports caused, and of theirs only failed neighbours.

    Of these a deletion is known: it is told twice, the second time as if nobody had done it.

    Raises:
        OSError: the kernel refuses.
    """
    own = sorted(ports)[:MOST_PORTS]
    code = [(LOAD_WORD, 0, 0, PORT_AT)]
    # Past the other ports and the verdict for strangers.
    code += [(JUMP_IF_EQUAL, len(own) - place, 0, socket.htonl(port)) for place, port in enumerate(own)]
    code += [
        (RETURN, 0, 0, ALL),
        (LOAD_HALF, 0, 0, TYPE_AT),
        (JUMP_IF_EQUAL, 0, 3, socket.htons(rt.RTM_NEWNEIGH)),
        (LOAD_HALF, 0, 0, STATE_AT),
        (JUMP_IF_EQUAL, 0, 1, socket.htons(rt.NUD_FAILED)),
        (RETURN, 0, 0, ALL),
        (RETURN, 0, 0, NONE),
    ]
    program = ctypes.create_string_buffer(b"".join(INSTRUCTION.pack(*step) for step in code))
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(code), ctypes.addressof(program))
    )
