"""What a fault is: how to cause and to heal it, and what it may do to traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.schedule import Step
    from tests.chaos.world import World

    Heal = Callable[[], object]
    Inject = Callable[[World, Step], "Heal | None"]

FOREVER = 1e9
LONG_AFTER = 12.0
"""Seconds after a heal within which all must be well, on a busy machine."""
SOON_AFTER = 6.0
"""The same for what is repaired by an event in the host itself."""


class Impossible(Exception):
    """This fault cannot be caused now, as when etcd has no leader; it is passed over."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault. Templates have `{}` where the name of a target goes, and `*` for all of a kind."""

    name: str
    inject: Inject
    """Causes it; what it returns heals it."""
    on: str = ""
    """Whom it befalls: host, pair (of hosts), member (of etcd), majority (of members)."""
    seconds: tuple[float, float] = (0, 0)
    """How long, at least and at most."""
    holds: tuple[str, ...] = ()
    """Templates of what nobody else may harm meanwhile."""
    breaks: str = ""
    """Whose packets may be lost: a template of hosts, or `*`; empty: nobody's, whatever it is."""
    udp_breaks: str = ""
    """The same for backend udp, whose packets go through a process."""
    latent: bool = False
    """Packets may be lost only while what it needs is disabled."""
    needs: tuple[str, ...] = ()
    """Templates of what must work for the repair: `daemon:{}`, `registry:*`."""
    disables: tuple[str, ...] = ()
    """Templates of what does not work meanwhile …"""
    disables_for: float = FOREVER
    """… but for so many seconds at most: there are other members."""
    stirs: str = ""
    """In whose kernel it changes rows of ours itself: a template of hosts."""
    grace: float = LONG_AFTER
    """Seconds after heal and needs within which packets may still be lost."""
    backends: tuple[str, ...] = ()
    """Those it exists with; all when empty."""
    told_after: float = 0
    """Seconds after which the host's status must say that something is wrong; 0: it need not."""
    weight: float = 1.0
