"""What every backend is: a frozen value that states what it wants and touches nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from msgspec import Struct, field
from msgspec.structs import asdict

from flanneld_py.addresses import IPAddress, PerFamily
from flanneld_py.core.configkeys import Key
from flanneld_py.model import Host, NextHop, Record, Route, State


class Published(Struct, frozen=True):
    """What a backend puts into the host's record."""

    backend_type: str
    """As in the registry: empty for backends that publish none."""
    public_ips: PerFamily[IPAddress]
    backend_data: PerFamily[Any] = field(default_factory=PerFamily)


class Backend(Protocol):
    """One way to carry packets between hosts."""

    @property
    def type(self) -> str:
        """The name in the config's `Backend.Type`, and in records that publish one."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """What may stand in the config's `Backend` beside its type."""

    @property
    def watches_checksums(self) -> bool:
        """Whether `Host.bad_checksums` matters to it."""

    def mtu(self, host: Host) -> int:
        """FLANNEL_MTU: the largest packet, in bytes, a container may send into the overlay."""

    def published(self, host: Host, own: Record | None, taken: Collection[str] = ()) -> Published:
        """What peers need to reach this host.

        Args:
            host: this host.
            own: the record that stands in the registry, if any.
            taken: VTEP MACs that belong to others.
        """

    def desired(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        """The kernel state for these peers, all of which are of this backend and none of which is `own`."""

    def peer_rows(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        """Those rows of `desired` that would not be there without these peers."""


def options_of(backend: Backend) -> dict[str, Any]:
    """Its options by field name, defaults filled in."""
    if not isinstance(backend, Struct):
        return {}
    options = asdict(backend)
    return {name: value for name, value in options.items() if name not in ("families", "networks")}


def direct_route(host: Host, public: IPAddress) -> Route:
    """A plain route to a peer on a network that the external interface is connected to."""
    return Route(NextHop(host.external.name, public, onlink=False))
