"""Everything that may happen next to hosts and etcd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flanneld_py.core.records import parse_key
from flanneld_py.core.subnetchoice import is_compatible
from tests.unit.model.etcdtwin import UNREACHABLE, Event, Reply, Request, answer, end_lease
from tests.unit.model.keeperstep import (
    SUBNETS,
    Body,
    Brain,
    Done,
    Keepers,
    Seen,
    View,
    folded,
    network_of,
    record_of,
)
from tests.unit.model.world import (
    Member,
    Scenario,
    Step,
    World,
    disown,
    host_at,
    host_name,
    is_restless,
    listed,
    name,
    renews,
    sent,
    short,
    subnets_in,
    told,
    with_member,
    with_reply,
)


class Move(NamedTuple):
    """One thing that may happen."""

    what: str
    after: World
    fault: bool = False


class Rules:
    """What may happen in a scenario."""

    def __init__(self, scenario: Scenario, keepers: Keepers) -> None:
        self.scenario = scenario
        self._keepers = keepers
        self._steps: dict[Any, Any] = {}

    def moves(self, world: World) -> Iterator[Move]:
        """Everything that may happen next."""
        started_before = True
        for n, member in enumerate(world.members):
            if member.phase == "up":
                yield from self._of_running(world, n, member)
            elif started_before or not self.scenario.alike:
                # Of hosts that are alike the first starts first.
                yield from self._starts(world, n, member)
            started_before = started_before and member.phase != "new"
        for lease in world.etcd.leases:
            yield from self._expiry(world, lease.lease, lease.host)
        for i, (n, request) in enumerate(world.late):
            rest = (*world.late[:i], *world.late[i + 1 :])
            after, reply = self._carry_out(world._replace(late=rest), n, request)
            yield Move(f"etcd carries out what {name(n)} gave up: {told(request, reply)}", after)
        for key in world.etcd.keys:
            for left in self._spend(world, "delete"):
                gone = sent(
                    left._replace(
                        etcd=left.etcd._replace(keys=tuple(k for k in left.etcd.keys if k is not key))
                    ),
                    (Event(world.revision + 1, key.name, None),),
                )
                yield Move(f"somebody deletes {short(key.name)}", disown(gone, key.name), fault=True)

    # --- a host that runs

    def _of_running(self, world: World, n: int, member: Member) -> Iterator[Move]:
        if member.step is not None:
            yield from self._answers(world, n, member.step)
        else:
            for count in range(1, len(member.coming) + 1):
                view = member.view
                for events in member.coming[:count]:
                    view = folded(view, events)
                fresh = member._replace(coming=member.coming[count:])
                yield from self._turn(
                    with_member(world, n, fresh), n, "", view, f"{name(n)} sees {listed(view)}"
                )
            for due, why in self._timers(world, member):
                yield from self._turn(world, n, due, member.view, f"{name(n)} {why}")
            if member.brain.awaited is not None:
                # That etcd has answered and the watch lags behind for so long is a fault of its own.
                what = f"{name(n)} has waited long enough for the watch"
                for left in self._spend(world, "lag") if member.coming else [world]:
                    fault = bool(member.coming)
                    yield from self._turn(left, n, "await", member.view, what, fault)
            if member.config + 1 < len(self.scenario.configs):
                changed = member._replace(config=member.config + 1, owns=b"")
                what = f"{name(n)} takes over the next config"
                yield from self._turn(with_member(world, n, changed), n, "", member.view, what)
            for left in self._spend(world, "address"):
                # What a record proves by its address alone may be lost with that; not while the host runs.
                moved = member._replace(address=member.address + 10)
                what = f"{name(n)} gets another address"
                yield from self._turn(with_member(left, n, moved), n, "", member.view, what, fault=True)
        for left in self._spend(world, "kill"):
            gone = member._replace(phase="down", brain=Brain(), step=None, view=(), coming=())
            yield Move(f"{name(n)} is killed", with_member(left, n, gone), fault=True)

    def _timers(self, world: World, member: Member) -> Iterator[tuple[str, str]]:
        brain = member.brain
        ours = brain.own.key.lease if brain.renews and brain.own else 0
        ended = [
            lease
            for lease in (ours, brain.writer_lease if brain.writer_renews else 0)
            if lease and world.etcd.host_of(lease) is None
        ]
        if ended:
            yield "renew", "renews its etcd lease"
        if brain.awaited is not None:
            return
        if brain.looks:
            yield "look", "looks again"
        if is_restless(member):
            yield "", "tries again"

    def _starts(self, world: World, n: int, member: Member) -> Iterator[Move]:
        view: View = tuple(Seen(key, 0) for key in world.etcd.keys)
        if member.phase in ("new", "down"):
            brain = Brain() if member.saved is None else Brain(last=((member.saved[0],), *member.saved[1:]))
            up = member._replace(phase="up", brain=brain)
            yield from self._turn(with_member(world, n, up), n, "", view, f"{name(n)} starts")
        if member.phase == "down" and member.saved is not None:
            for left in self._spend(world, "forget"):
                up = member._replace(phase="up", brain=Brain(), saved=None)
                what = f"{name(n)} starts without its state directory"
                yield from self._turn(with_member(left, n, up), n, "", view, what, fault=True)

    def _turn(
        self, world: World, n: int, due: str, view: View, what: str, fault: bool = False
    ) -> Iterator[Move]:
        yield from self._go_on(world, n, Step(due, view, (), Request("")), what, fault)

    def _answers(self, world: World, n: int, step: Step) -> Iterator[Move]:
        """The request that is under way is answered; or carried out, or not, and not answered."""
        after, reply = self._carry_out(world, n, step.request)
        yield from self._go_on(after, n, with_reply(step, reply), f"{name(n)}: {told(step.request, reply)}")
        unheard, what = with_reply(step, UNREACHABLE), f"{name(n)}: {told(step.request)}, which etcd"
        if reply[0] is True:
            for left in self._spend(after, "lose"):
                yield from self._go_on(left, n, unheard, f"{what} carries out, but the answer is lost", True)
        for left in self._spend(world, "lose"):
            yield from self._go_on(left, n, unheard, f"{what} never gets", True)
        for left in self._spend(world, "late"):
            delayed = left._replace(late=(*left.late, (n, step.request)))
            yield from self._go_on(delayed, n, unheard, f"{what} gets late", True)

    def _silence(self, world: World, n: int, step: Step, lease: int, what: str) -> Iterator[Move]:
        """Whoever does not renew an etcd lease may have stopped so long ago that he counts as gone.

        His record is then anybody's who has the same name or address, though he come back before its end.
        """
        holder = world.etcd.host_of(lease)
        if holder is None or holder < 0 or renews(world.members[holder], lease):
            return
        leases = tuple(
            found._replace(host=-1) if found.lease == lease else found for found in world.etcd.leases
        )
        orphaned = world._replace(etcd=world.etcd._replace(leases=leases))
        for key in world.etcd.keys:
            if key.lease == lease:
                orphaned = disown(orphaned, key.name)
        found = f"{what}, and finds that nobody renews the etcd lease of {name(holder)}"
        yield from self._go_on(orphaned, n, with_reply(step, (1,)), found)

    def _go_on(self, world: World, n: int, step: Step, what: str, fault: bool = False) -> Iterator[Move]:
        """The keeper's step, up to where it waits for etcd again or is done."""
        member = world.members[n]
        found = self._step(n, member, step)
        if isinstance(found, Done):
            if found.ended:
                yield Move(
                    what, with_member(world, n, member._replace(phase="ended", step=None, owns=b"")), fault
                )
                return
            fresh = member._replace(
                node_id=found.node_id, saved=found.saved, view=step.view, brain=found.brain, step=None
            )
            yield Move(what, self._holding(with_member(world, n, fresh), n, member), fault)
        elif not isinstance(found, Request):
            for chosen, answered in self._choices(world, n, found, step):
                yield from self._go_on(world, n, answered, f"{what}{chosen}", fault)
        elif found.what in ("alive", "grant"):
            # Nothing that others do at the same time comes to another end before or after it.
            after, reply = self._carry_out(world, n, found)
            yield from self._go_on(after, n, with_reply(step, reply), what, fault)
        elif found.what == "ttl":
            after, reply = self._carry_out(world, n, found)
            yield from self._go_on(after, n, with_reply(step, reply), what, fault)
            yield from self._silence(world, n, step, found.lease, what)
        else:
            waiting = member._replace(step=step._replace(request=found))
            yield Move(f"{what}, and asks for: {told(found)}", with_member(world, n, waiting), fault)

    def _choices(self, world: World, n: int, need: tuple[str, int], step: Step) -> Iterator[tuple[str, Step]]:
        """The answers to a throw of the dice; of subnets that nobody has ever had one stands for all."""
        kind, count = need
        if kind == "lease":
            yield "", with_reply(step, (world.lease + 1,))
            return
        known = subnets_in(world)
        tried = set()
        for i in range(count):
            answered = with_reply(step, (i,))
            chosen = self._chosen(world, n, answered)
            alike = tuple(net if net in known else net.prefixlen for net in chosen)
            if alike not in tried or not chosen:
                tried.add(alike)
                yield "", answered

    def _chosen(self, world: World, n: int, step: Step) -> tuple[Any, ...]:
        """The subnets that are asked for in the end."""
        while True:
            found = self._step(n, world.members[n], step)
            if isinstance(found, Done):
                return ()
            if not isinstance(found, Request):
                if found[0] == "choice":
                    return ()  # of another family; that one is told apart when it is thrown for
                step = with_reply(step, (world.lease + 1,))
            elif found.what == "txn":
                put = next(op for op in found.success if op.what == "put")
                return parse_key(put.name.removeprefix(SUBNETS).decode()).values()
            else:
                step = with_reply(step, answer(world.etcd, found, n, 0)[2])

    def _step(self, n: int, member: Member, step: Step) -> Any:
        known = (n, member.node_id, member.address, member.config, member.saved, member.view, member.brain)
        question = (known, step.due, step.view, step.replies)
        if question not in self._steps:
            body = self._body(n, member, step.view)
            self._steps[question] = self._keepers.step(
                body, member.brain, member.view, step.due, step.replies
            )
        return self._steps[question]

    def _body(self, n: int, member: Member, view: View) -> Body:
        config, scenario = self.scenario.configs[member.config], self.scenario
        return Body(
            host=host_at(n, *host_name(member), network_of(config, scenario.parse).config.families),
            host_name=host_name(member),
            network=network_of(config, scenario.parse),
            config=config,
            view=view,
            saved=member.saved,
            node_id=member.node_id,
            fixed_id=scenario.fixed_id,
            on_loss=scenario.on_loss,
        )

    def _holding(self, world: World, n: int, before: Member) -> World:
        """What a host holds for the first time, and what etcd says is its own, is its own from then on."""
        member = world.members[n]
        own = member.brain.own
        if member.brain.state != "held" or own is None or (before.brain.own == own and before.owns):
            return world
        there = world.etcd.key(own.key.name)
        config = network_of(self.scenario.configs[member.config], self.scenario.parse).config
        if (
            there != own.key
            or world.etcd.host_of(own.key.lease) != n
            or not is_compatible(record_of(own), config)
        ):
            return world
        return with_member(world, n, member._replace(owns=own.key.name))

    # --- etcd

    def _carry_out(self, world: World, n: int, request: Request) -> tuple[World, Reply]:
        etcd, events, reply = answer(world.etcd, request, n, world.revision + 1)
        for event in events:
            old = world.etcd.key(event.name)
            holder = world.etcd.host_of(old.lease) if old is not None else None
            if old is not None and holder not in (n, -1, None):
                world = world._replace(wrong=f"{name(n)} writes over {short(old.name)} of {name(holder)}")
        after = sent(world._replace(etcd=etcd, lease=max(world.lease, request.lease)), events)
        for event in events:
            if event.key is None and after.members[n].owns == event.name:
                moved = any(e.key is not None for e in events)
                allowed = len(self.scenario.configs) > 1 and moved
                after = disown(after, event.name) if allowed else after
        return after, reply

    def _expiry(self, world: World, lease: int, holder: int) -> Iterator[Move]:
        keys = [key.name for key in world.etcd.keys if key.lease == lease]
        renewed = holder >= 0 and renews(world.members[holder], lease)
        for left in self._spend(world, "starve") if renewed else [world]:
            etcd, events = end_lease(left.etcd, lease, world.revision + 1)
            after = sent(left._replace(etcd=etcd), events)
            running = holder >= 0 and world.members[holder].phase == "up"
            for key in keys:
                # A host that runs and reaches etcd, and does not renew what it holds, is at fault itself.
                if renewed or not running:
                    after = disown(after, key)
            who = name(holder) if holder >= 0 else "nobody"
            why = "was cut off or frozen for a TTL" if renewed else "does not renew"
            yield Move(f"etcd ends the lease that {who} {why}", after, fault=renewed)

    def _spend(self, world: World, fault: str) -> list[World]:
        left = dict(world.faults)
        if left.get(fault, 0) < 1 or left["all"] < 1:
            return []
        left[fault] -= 1
        left["all"] -= 1
        return [world._replace(faults=tuple(sorted(left.items())))]
