"""alloc: only leases. Each host gets its subnet and subnet.env; carrying packets is somebody else's job."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from msgspec import Struct

from flanneld_py.backends.base import Published
from flanneld_py.core.configkeys import Key
from flanneld_py.model import Host, NetworkConfig, Record, State


class Alloc(Struct, frozen=True):
    """The config's Backend with type alloc; it has no options."""

    type: ClassVar[str] = "alloc"

    @classmethod
    def from_config(cls, config: NetworkConfig) -> Alloc:  # noqa: ARG003 - one signature for all backends
        return cls()

    @property
    def keys(self) -> tuple[Key, ...]:
        return ()

    @property
    def watches_checksums(self) -> bool:
        return False

    def mtu(self, host: Host) -> int:
        return host.external.mtu

    def published(self, host: Host, own: Record | None, taken: Collection[str] = ()) -> Published:  # noqa: ARG002 - see Backend
        # Its records bear no type, as flannel writes them.
        return Published(backend_type="", public_ips=host.external.public)

    def desired(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        return self.peer_rows(own, peers, host)

    def peer_rows(self, own: Record, peers: Sequence[Record], host: Host) -> State:  # noqa: ARG002 - see Backend
        return State()
