"""Every history of a scenario, breadth first: what may never be, what must come about, and the way to it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flanneld_py.core.records import parse_key
from tests.unit.model.keeperstep import Keepers, outside_time
from tests.unit.model.moves import Rules
from tests.unit.model.world import Member, Scenario, World, canonical, is_at_rest, name, short


@dataclass
class Found:
    """What an exploration came to."""

    scenario: str
    states: int = 0
    steps: int = 0
    seconds: float = 0.0
    complete: bool = False
    wrong: str = ""
    """What is wrong, and the shortest history that leads to it; empty: nothing is."""
    path: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = f"{self.scenario}: {self.states:,} states, {self.steps:,} steps, {self.seconds:.0f} s"
        if not self.wrong:
            return told if self.complete else f"{told}, not complete"
        history = "\n".join(f"  {i:2}. {line}" for i, line in enumerate(self.path, 1))
        return f"{told}\n{self.wrong}:\n{history}"


def explore(scenario: Scenario, *, most: int = 2_000_000) -> Found:
    """Look at every state that a scenario can come to, or at the first `most` of them."""
    keepers = Keepers()
    with outside_time(keepers):
        return _Exploration(scenario, Rules(scenario, keepers), most).run()


class _Exploration:
    def __init__(self, scenario: Scenario, rules: Rules, most: int) -> None:
        self._scenario = scenario
        self._rules = rules
        self._most = most
        self._parents: dict[World, tuple[World, str] | None] = {}
        self._next: dict[World, tuple[World, str] | None] = {}
        """What comes after each state when there are no faults and nobody hangs; None: nothing any more."""
        self.found = Found(scenario.name)

    def run(self) -> Found:
        began = time.monotonic()
        if self._is_safe():
            self._check_ends()
        self.found.states = len(self._parents)
        self.found.seconds = time.monotonic() - began
        return self.found

    def _is_safe(self) -> bool:
        """Visit all states; whether all of them may be."""
        first = canonical(self._scenario.start())
        self._parents[first] = None
        layer = [first]
        while layer:
            following: list[World] = []
            for world in layer:
                for after, what in self._visit(world):
                    self._parents[after] = (world, what)
                    if wrong := after.wrong or violation(after):
                        self._tell(wrong, after)
                        return False
                    following.append(after)
                if len(self._parents) >= self._most:
                    return True
            layer = following
        self.found.complete = True
        return True

    def _visit(self, world: World) -> Iterator[tuple[World, str]]:
        """The states that are new."""
        patient: tuple[int, tuple[World, str] | None] = (len(_ORDER) + 1, None)
        for move in self._rules.moves(world):
            self.found.steps += 1
            after = canonical(move.after)
            if not move.fault and after != world and (patience := _patience(move.what)) < patient[0]:
                patient = patience, (after, move.what)
            if after not in self._parents:
                yield after, move.what
        self._next[world] = patient[1]

    def _tell(self, wrong: str, world: World, more: Iterable[str] = ()) -> None:
        path: list[str] = []
        at: World | None = world
        while at is not None and (step := self._parents[at]) is not None:
            path.append(step[1])
            at = step[0]
        self.found.wrong = wrong
        self.found.path = path[::-1] + [f"(without faults) {line}" for line in more]

    def _check_ends(self) -> None:
        """From every state, all come to what they want once there are no more faults."""
        good: set[World] = set()
        for world in self._next:
            path: dict[World, str] = {}
            at = world
            while at not in good and at in self._next:
                step = self._next[at]
                wrong = "they write for ever" if at in path else step is None and unserved(self._scenario, at)
                if wrong:
                    self._tell(wrong, world, path.values())
                    return
                if step is None:
                    break
                path[at] = step[1]
                at = step[0]
            good.update(path)


_ORDER = (
    "starts",
    "carries out what",
    "sees",
    ": ",
    "takes over",
    "does not renew",
    "renews",
    "has waited",
    "tries",
)


def _patience(what: str) -> int:
    """Work first, then what only comes with time; everything that is seen is seen at once."""
    return next((i for i, word in enumerate(_ORDER) if word in what), len(_ORDER))


# --- what may never be ------------------------------------------------------------------------------


def violation(world: World) -> str:
    """Which invariant does not hold; empty: all of them do."""
    live = [(n, member) for n, member in enumerate(world.members) if is_live_owner(world, member)]
    for i, (n, member) in enumerate(live):
        for other, rival in live[:i]:
            if _overlap(member, rival):
                return f"two live owners of one subnet: {name(other)} and {name(n)}"
    for key in world.etcd.keys:
        if not key.lease:
            return f"{short(key.name)} stands for good, as it has no etcd lease"
    for n, member in enumerate(world.members):
        if member.owns and not _is_its(world, n, member.owns):
            return f"{name(n)} reaches etcd and has lost {short(member.owns)}"
        believes = member.phase == "up" and member.brain.state == "held" and member.brain.own is not None
        if believes and is_at_rest(member) and not is_live_owner(world, member):
            return f"{name(n)} has seen all there is and believes that it holds what it does not"
    return ""


def is_live_owner(world: World, member: Member) -> bool:
    """Whether it runs, says that it holds its record, and that is the very record in etcd."""
    own = member.brain.own
    if member.phase != "up" or member.brain.state != "held" or own is None:
        return False
    return world.etcd.key(own.key.name) == own.key


def _is_its(world: World, n: int, key: bytes) -> bool:
    there = world.etcd.key(key)
    return there is not None and world.etcd.host_of(there.lease) == n


def _overlap(one: Member, other: Member) -> bool:
    nets = [
        parse_key(short(member.brain.own.key.name)).values() for member in (one, other) if member.brain.own
    ]
    return any(a.version == b.version and a.overlaps(b) for a in nets[0] for b in nets[1])


def unserved(scenario: Scenario, world: World) -> str:
    """What is wrong with an end."""
    running = [member for member in world.members if member.phase == "up"]
    holding = [member for member in running if is_live_owner(world, member)]
    wanted = len(running) if scenario.served is None else scenario.served
    if scenario.on_loss == "hold":
        # Who waits for his subnet, which another one has, is where the operator wants him.
        wanted -= sum(member.brain.state == "conflict" and member.brain.own is not None for member in running)
    if len(holding) < wanted:
        states = ", ".join(f"{name(n)} {m.brain.state}" for n, m in enumerate(world.members))
        return f"without faults only {len(holding)} of {wanted} hosts come to a lease ({states})"
    ours = {member.brain.own.key.name for member in running if member.brain.own is not None}
    left = [short(key.name) for key in world.etcd.keys if key.name not in ours]
    return f"nobody uses {', '.join(left)}, and it does not end" if left else ""
