"""Checksum offload of our devices: whether they send packets whose checksum is yet to be filled in.

One feature of a device, read and set by ioctl (ethtool(8), linux/ethtool.h); the kernel tells of a change by
a notification of the link.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence

from flanneld_py.errors import KernelError
from flanneld_py.model import Op, Outcome, Scope, State, Table

SIOCETHTOOL = 0x8946
ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM = 0x16, 0x17
ETHTOOL_VALUE = struct.Struct("=II")
"""struct ethtool_value: command, data."""
IFREQ = struct.Struct("@16sP16x")
"""struct ifreq (linux/if.h): name, pointer to the command."""


class Offloads:
    """Driver of the table offloads. A device nobody has a wish about is left as it is."""

    tables: tuple[Table, ...] = ("offloads",)

    def observe(self, scope: Scope) -> State:
        """Only the devices that the scope names; one that does not exist yet is left out."""
        try:
            with _socket() as sock:
                found = {dev: _read(sock, dev) for dev in scope.offloads}
        except OSError as error:
            raise KernelError(f"cannot read the checksum offload of devices: {error.strerror}") from error
        return State(offloads={dev: on for dev, on in found.items() if on is not None})

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        with _socket() as sock:
            return [Outcome(op, _write(sock, op)) for op in ops]


def _socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def _read(sock: socket.socket, dev: str) -> bool | None:
    """None: there is no such device."""
    try:
        return bool(_ethtool(sock, dev, ETHTOOL_GTXCSUM))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def _write(sock: socket.socket, op: Op) -> str | None:
    # What is no longer wanted goes back to the kernel's default: on.
    on = op.value if op.verb == "set" else True
    try:
        _ethtool(sock, op.key, ETHTOOL_STXCSUM, int(on))
    except OSError as error:
        if op.verb == "del" and error.errno == errno.ENODEV:
            return None
        name = errno.errorcode.get(error.errno or 0, "?")
        return (
            f"cannot turn the checksum offload of {op.key} {'on' if on else 'off'}: {error.strerror} ({name})"
        )
    return None


def _ethtool(sock: socket.socket, dev: str, command: int, data: int = 0) -> int:
    value = ctypes.create_string_buffer(ETHTOOL_VALUE.pack(command, data), ETHTOOL_VALUE.size)
    fcntl.ioctl(sock, SIOCETHTOOL, IFREQ.pack(os.fsencode(dev), ctypes.addressof(value)))
    return int(ETHTOOL_VALUE.unpack(value.raw)[1])
