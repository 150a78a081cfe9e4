"""What may come out of the decision on our lease, and what this host brings to it."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

from msgspec import Struct, field

from flanneld_py.addresses import IPAddress, PerFamily, Subnets
from flanneld_py.core.leasepolicy import OnLoss
from flanneld_py.core.records import format_key
from flanneld_py.model import Record

T = TypeVar("T")


class Keep(Struct, frozen=True):
    """The record stands as it should; nothing to write."""

    record: Record


class Adopt(Struct, frozen=True):
    """Write `wanted` over `record`, the same key, guarded by its mod_revision."""

    record: Record
    wanted: Record
    from_silent: bool = False
    """It is that of a host that counts as gone, and is to leave that host's etcd lease."""

    def __str__(self) -> str:
        return f"{self.record.key} is to be written anew"


class Move(Struct, frozen=True):
    """Put `wanted` in the place of `record`, which has another key, in one step and under its etcd lease."""

    record: Record
    wanted: Record
    from_silent: bool = False
    """As in `Adopt`."""

    def __str__(self) -> str:
        return f"another lease is to take the place of {self.record.key}"


class Release(Struct, frozen=True):
    """Delete `record`, ours but unfit, guarded by its mod_revision; then decide again."""

    record: Record
    reason: str

    def __str__(self) -> str:
        return f"{self.record.key} is to be given back"


class Claim(Struct, frozen=True):
    """Create `wanted`, guarded by the key not existing."""

    wanted: Record

    def __str__(self) -> str:
        return "a lease is to be claimed"


class Restore(Struct, frozen=True):
    """Write `wanted` over what cannot be read at its key, which is ours, under its etcd lease or a new one.

    Unless somebody else keeps that key alive, which only etcd can tell.
    """

    wanted: Record

    def __str__(self) -> str:
        return f"{self.wanted.key}, which cannot be read, is to be restored"


class Rename(Struct, frozen=True):
    """Another host uses our node id, in `record`: take another id, unless that host is gone."""

    record: Record
    reason: str


class Conflict(Struct, frozen=True):
    """Somebody else stands where we should; nothing is written while it lives."""

    record: Record
    reason: str
    fix: str
    held: Record | None = None
    """Ours, which stays meanwhile."""


class Wait(Struct, frozen=True):
    """There is nothing to be had now."""

    reason: str
    fix: str
    held: Record | None = None
    """Ours, which stays until there is."""


class End(Struct, frozen=True):
    """Our subnet is another's, and the operator wants the process to end then."""

    reason: str
    fix: str


Write: TypeAlias = Adopt | Move | Release | Claim | Restore
"""What changes the registry; as text it says what is to become of which key."""
Decision: TypeAlias = Write | Keep | Rename | Conflict | Wait | End


class Wish(Struct, frozen=True):
    """What this host brings to the decision besides its identity."""

    backend_type: str
    public_ips: PerFamily[IPAddress]
    backend_data: PerFamily[Any] = field(default_factory=PerFamily)
    previous: tuple[Subnets, ...] = ()
    """Subnets held before, most trusted first: in memory, state file, subnet.env."""
    etcd_lease: int = 0
    """The etcd lease that this machine held in its last run: proof after its address has changed."""
    last_key: str = ""
    """The key that it held then: the same proof for a reservation, which has no etcd lease."""
    held: Record | None = None
    """What this process holds; rewritten by somebody else with our node id it is a clone's."""
    written: Record | None = None
    """What this process last wrote, or tried to without learning what became of it."""
    granted: int = 0
    """The etcd lease under which this process claims: what bears it is ours, whatever it says."""
    silent: frozenset[str] = frozenset()
    """Keys of records whose owner has stopped renewing."""
    foreign: frozenset[str] = frozenset()
    """Keys whose values cannot be read, and that somebody else keeps alive."""
    fixed_id: bool = False
    """The node id was given by the operator: two hosts with it are his to tell apart."""
    on_loss: OnLoss = "hold"

    def record(self, subnets: Subnets, node_id: str) -> Record:
        return Record(
            key=format_key(subnets),
            subnets=subnets,
            # Of no other family: it would not be read back, and so be written again and again.
            public_ips=_of_families(subnets, self.public_ips),
            backend_type=self.backend_type,
            backend_data=_of_families(subnets, self.backend_data),
            node_id=node_id,
        )


def _of_families(subnets: Subnets, values: PerFamily[T]) -> PerFamily[T]:
    return PerFamily(
        v4=None if subnets.v4 is None else values.v4,
        v6=None if subnets.v6 is None else values.v6,
    )
