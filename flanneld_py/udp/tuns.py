"""The TUN devices that this process is attached to: as a device takes one reader, they have one place."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress

from flanneld_py.udp.pump import TUNSETPERSIST, open_tun

TUNGETIFF = 0x800454D2


def name_of(tun: int) -> str:
    """The device's present name; empty when it was deleted, or this is no TUN."""
    try:
        answer = fcntl.ioctl(tun, TUNGETIFF, bytes(40))
    except OSError:
        return ""
    name: bytes = struct.unpack_from("16s", answer)[0]
    return name.rstrip(b"\0").decode(errors="backslashreplace")


class Tuns:
    """Descriptors by device. One thread makes and closes them."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def make(self, name: str) -> None:
        """See drivers/tunmaker.py."""
        tun = open_tun(name, persistent=False, new=True)
        if (old := self._fds.get(name)) is not None:
            # That device is in another namespace by now, where nobody else would delete it.
            with suppress(OSError):
                fcntl.ioctl(old, TUNSETPERSIST, 0)
        self.adopt(name, tun)

    def keep(self, name: str) -> None:
        """See drivers/tunmaker.py."""
        fcntl.ioctl(self._fds[name], TUNSETPERSIST, 1)

    def adopt(self, name: str, tun: int) -> None:
        """Take over a descriptor that an earlier process left."""
        self.release(name)  # now, so that the two have different numbers
        self._fds[name] = tun

    def attached(self, name: str) -> int | None:
        """The descriptor, as long as there is the device."""
        tun = self._fds.get(name)
        return tun if tun is not None and name_of(tun) == name else None

    def attach(self, name: str) -> int:
        """The descriptor of a device that there is.

        Raises:
            OSError: another process has it (EBUSY), or it is no TUN such as `make` makes.
        """
        tun = self.attached(name)
        if tun is None:
            tun = open_tun(name, persistent=True)
            self.adopt(name, tun)
        return tun

    def release(self, name: str) -> None:
        """See drivers/tunmaker.py."""
        tun = self._fds.pop(name, None)
        if tun is not None:
            with suppress(OSError):
                os.close(tun)
