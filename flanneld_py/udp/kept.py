"""What an earlier process left for this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flanneld_py.udp.resume import Resumed

TUN, SOCKET, TABLE = "flannel-tun", "flannel-udp", "flannel-table"
NAMES = (TUN, SOCKET, TABLE)
"""Of kept descriptors."""


class Kept(NamedTuple):
    """Descriptors by name, and the pump that was started on them in advance, if it could be."""

    fds: Mapping[str, int]
    resumed: Resumed | None
