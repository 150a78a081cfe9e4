"""All that the lease protocol is made of, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.records import parse_key
from flanneld_py.model import Host, NetworkConfig
from tests.unit.model.etcdtwin import (
    FIRST_LEASE,
    FIRST_REVISION,
    Etcd,
    Event,
    Reply,
    Request,
)
from tests.unit.model.keeperstep import (
    SUBNETS,
    Brain,
    Saved,
    View,
)
from tests.unit.strategies import host as make_host


class Step(NamedTuple):
    """A step that the keeper is in the middle of: it waits for etcd, or hangs."""

    due: str
    view: View
    replies: tuple[Reply, ...]
    request: Request


class Member(NamedTuple):
    """One host."""

    phase: str = "new"
    """new: it was never started. up. down: killed. ended: by itself."""
    node_id: str = ""
    address: int = 0
    config: int = 0
    saved: Saved | None = None
    """The state file."""
    view: View = ()
    coming: tuple[tuple[Event, ...], ...] = ()
    """What the watch has not delivered yet, a revision each."""
    brain: Brain = Brain()
    step: Step | None = None
    owns: bytes = b""
    """The key that it has held, and that nothing but a fault may take from it."""


class World(NamedTuple):
    etcd: Etcd
    members: tuple[Member, ...]
    late: tuple[tuple[int, Request], ...] = ()
    """Requests still on their way that their host has given up."""
    faults: tuple[tuple[str, int], ...] = ()
    """How often each may still happen."""
    wrong: str = ""
    """What has just happened and never may."""
    revision: int = FIRST_REVISION
    lease: int = FIRST_LEASE
    """The last that etcd has given out; nothing else counts of it."""


@dataclass(frozen=True)
class Scenario:
    """What is explored: hosts, the subnets there are, and which faults how often."""

    name: str
    hosts: int
    configs: tuple[str, ...]
    """Texts; every host starts with the first and takes over the next at a time of its own."""
    parse: Callable[[str], NetworkConfig]
    faults: dict[str, int] = field(default_factory=dict)
    """By name: kill, forget (a restart without state), starve (a TTL without etcd), lose (a request or its
    answer), late (a request), lag (the watch, for seconds), delete (a key), address (another one)."""
    at_most: int = 9
    """Faults in one history."""
    node_ids: tuple[str, ...] = ()
    addresses: tuple[int, ...] = ()
    fixed_id: bool = False
    on_loss: str = "renumber"
    served: int | None = None
    """Hosts that hold a lease in the end; None: all."""

    def start(self) -> World:
        names = self.node_ids or tuple(f"node-{n}" for n in range(1, self.hosts + 1))
        addresses = self.addresses or tuple(range(1, self.hosts + 1))
        members = (Member(node_id=name, address=ip) for name, ip in zip(names, addresses, strict=True))
        faults = {**self.faults, "all": self.at_most}
        return World(Etcd(), tuple(members), faults=tuple(sorted(faults.items())))

    @property
    def alike(self) -> bool:
        """Whether hosts differ in nothing but their names."""
        return not self.node_ids and not self.addresses


# --- small things -----------------------------------------------------------------------------------


def name(n: int) -> str:
    return "ABCDE"[n]


def short(key: bytes) -> str:
    return key.removeprefix(SUBNETS).decode()


def told(request: Request, reply: Reply | None = None) -> str:
    """A request for people to read."""
    if request.what != "txn":
        return (
            f"{request.what} of an etcd lease" if request.lease else f"{request.what} {short(request.name)}"
        )
    done = " and ".join(f"{op.what} {short(op.name)}" for op in request.success)
    if reply is None:
        return done
    return f"{done}: {'done' if reply[0] is True else 'refused'}"


def listed(view: View) -> str:
    return ", ".join(short(seen.key.name) for seen in view) or "nothing"


def with_member(world: World, n: int, member: Member) -> World:
    return world._replace(members=(*world.members[:n], member, *world.members[n + 1 :]))


def sent(world: World, events: tuple[Event, ...]) -> World:
    """Sent to all who watch."""
    if not events:
        return world
    return world._replace(
        revision=events[0].revision,
        members=tuple(
            member._replace(coming=(*member.coming, events)) if member.phase == "up" else member
            for member in world.members
        ),
    )


def disown(world: World, key: bytes) -> World:
    return world._replace(members=tuple(m._replace(owns=b"") if m.owns == key else m for m in world.members))


def with_reply(step: Step, reply: Reply) -> Step:
    return step._replace(replies=(*step.replies, reply), request=Request(""))


def is_restless(member: Member) -> bool:
    """Whether its keeper turns again though nothing has come: after an error, or a change of its name."""
    decided_on = member.brain.decided_on
    return member.brain.failed or (decided_on != () and decided_on[1] != host_name(member))


def is_at_rest(member: Member) -> bool:
    """Whether it has seen all there is, and has done what it wants."""
    return not (member.step or member.coming or member.brain.awaited or is_restless(member))


def renews(member: Member, lease: int) -> bool:
    """Whether a host keeps an etcd lease alive, as its keeper's own timers say.

    One that still has something to do has not left anything to its fate.
    """
    brain = member.brain
    if member.phase != "up":
        return False
    own = brain.own.key.lease if brain.own is not None and brain.renews else 0
    return not is_at_rest(member) or lease in (own, brain.writer_lease if brain.writer_renews else 0)


def subnets_in(world: World) -> set[Any]:
    """Those that anybody has, had or asks for."""
    found: set[Any] = set()
    stack: list[Any] = [world]
    while stack:
        for part in stack.pop():
            if isinstance(part, bytes) and part.startswith(SUBNETS):
                found.update(parse_key(short(part)).values())
            elif isinstance(part, PerFamily):
                found.update(part.values())
            elif isinstance(part, tuple):
                stack.append(part)
    return found


def host_name(member: Member) -> tuple[str, int]:
    return member.node_id, member.address


@cache
def host_at(n: int, node_id: str, address: int, families: tuple[Any, ...]) -> Host:
    made = make_host(address, families, node_id=node_id)
    # A clone has all of its original but the MAC.
    return replace(made, external=replace(made.external, mac=f"02:00:00:00:00:{n:02x}"))


def canonical(world: World) -> World:
    """The same, numbered anew: only the order of revisions counts, and which etcd leases are the same."""
    parts = (world.etcd, *world.members, world.late)
    found = [_numbers_in(part) for part in parts]
    revisions = sorted({revision for numbers, _ in found for revision in numbers})
    leases = dict.fromkeys(lease for _, numbers in found for lease in numbers)
    last = FIRST_REVISION + len(revisions), FIRST_LEASE + len(leases)
    fresh = {old: new for new, old in enumerate(revisions, FIRST_REVISION + 1)}
    fresh |= {old: new for new, old in enumerate(leases, FIRST_LEASE + 1)}
    if all(old == new for old, new in fresh.items()):
        return world._replace(revision=last[0], lease=last[1])
    etcd, *members, late = (
        _renumbered(part, tuple((old, fresh[old]) for old in (*numbers[0], *numbers[1])))
        for part, numbers in zip(parts, found, strict=True)
    )
    etcd = etcd._replace(leases=tuple(sorted(etcd.leases)))
    return world._replace(etcd=etcd, members=tuple(members), late=late, revision=last[0], lease=last[1])


@cache
def _numbers_in(part: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The revisions, and the ids of etcd leases in the order in which they appear."""
    numbers: dict[int, None] = {}
    _collect(part, numbers)
    revisions = sorted(number for number in numbers if FIRST_REVISION <= number < FIRST_LEASE)
    return tuple(revisions), tuple(number for number in numbers if number >= FIRST_LEASE)


def _collect(part: tuple[Any, ...], numbers: dict[int, None]) -> None:
    for inner in part:
        if isinstance(inner, tuple):
            _collect(inner, numbers)
        elif isinstance(inner, int):
            numbers.setdefault(inner)


@cache
def _renumbered(part: Any, fresh: tuple[tuple[int, int], ...]) -> Any:
    if all(old == new for old, new in fresh):
        return part
    return _with_numbers(part, dict(fresh))


def _with_numbers(part: Any, fresh: dict[int, int]) -> Any:
    made = [
        _with_numbers(inner, fresh)
        if isinstance(inner, tuple)
        else fresh.get(inner, inner)
        if isinstance(inner, int)
        else inner
        for inner in part
    ]
    if all(new is old for new, old in zip(made, part, strict=True)):
        return part
    return type(part)(*made) if hasattr(part, "_make") else tuple(made)
