"""What the operator wants of the lease."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

OnLoss: TypeAlias = Literal["hold", "renumber", "exit"]
DEFAULT_TTL = 86_400
"""Seconds; what flannel grants."""
LOWEST_TTL = 5
"""Seconds; with less, renewing in time cannot be promised."""


class LeasePolicy(Struct, frozen=True):
    """How long a lease lives, when it is written again for Go flannel's sake, and what its loss means."""

    ttl: int = DEFAULT_TTL
    """Seconds granted to a new lease."""
    renew_margin: int = 3600
    """Seconds before its end at which the record is written again while Go flannel hosts take part."""
    on_loss: OnLoss = "hold"
    """When another host holds our subnet: wait for it, take another subnet, or end with 75."""
