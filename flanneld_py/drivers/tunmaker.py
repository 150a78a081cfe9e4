"""What the driver of links needs in order to make a TUN device, which comes and goes by a descriptor."""

from __future__ import annotations

import errno
from typing import Protocol

from flanneld_py.errors import Unsupported


class TunMaker(Protocol):
    """Keeps the descriptors."""

    def make(self, name: str) -> None:
        """A device that goes with its descriptor.

        Raises:
            OSError: no such driver, no right to it, or there is one of that name.
        """

    def keep(self, name: str) -> None:
        """From now on it outlives its descriptor."""

    def release(self, name: str) -> None:
        """Close the descriptor, if there is one."""


def refused_tun(called: str, error: OSError) -> str:
    """Why a TUN device could not be made, and what to do.

    Raises:
        Unsupported: this kernel, or this container, has none.
    """
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        raise Unsupported(
            f"cannot create {called}: /dev/net/tun: {error.strerror}: load the kernel's module tun "
            f"(CONFIG_TUN), give a container the device (--device /dev/net/tun), or set the config's "
            f"Backend.Type to vxlan"
        ) from error
    if error.errno in (errno.EPERM, errno.EACCES):
        needed = "it takes CAP_NET_ADMIN, and write access to it"
        return f"cannot create {called}: /dev/net/tun: {error.strerror}; {needed}"
    return f"cannot create {called}: {error.strerror}"
