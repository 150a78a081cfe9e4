"""The one thread that writes the kernel: makes it what should be, and looks again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, get_args

import structlog
from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.core.describe import WAITS, describe
from flanneld_py.core.linger import Departures, departures, departures_since, left_since
from flanneld_py.core.pace import RetrySchedule, TokenBucket
from flanneld_py.core.plan import apply_all, lost_devices, plan, referents, share
from flanneld_py.core.registrycache import LastPeers
from flanneld_py.daemon import garbage
from flanneld_py.daemon.aim import Aim
from flanneld_py.daemon.execute import Executor
from flanneld_py.daemon.inbox import Inbox, Levels, Problem, Report, boottime, utc_now
from flanneld_py.daemon.leftout import LeftOut
from flanneld_py.daemon.recall import is_withheld
from flanneld_py.daemon.target import Feasible, Inputs, Settings, Target, feasible_target, inputs_of, same
from flanneld_py.errors import FlanneldError, Unsupported
from flanneld_py.model import Op, Outcome, State, Table, Verb

ROUNDS = 5
"""Within one pass: the kernel cascades (a link going down takes its routes along), so read and plan again."""
BURST, PER_SECOND = 10, 10.0
"""Of repairs: firewalls that reload five times a second must not outrun them."""
READ_BACK_SMALL, READ_BACK_LARGE, SMALL_STATE = 60.0, 600.0, 1000
"""Seconds between read-backs when nothing was heard, up to this many routes and above."""
UNREAD_AGAIN = 1.0
"""Seconds until the kernel is read again that could not be read."""
TABLES: tuple[Table, ...] = get_args(Table)
READ_AGAIN = ("links", "rules")
"""Tables whose writing does more than the ops say, or is done by a tool that has its own mind."""
APART: tuple[Table, ...] = ("rules",)
"""Tables that others change as well, perhaps all the time while we read; nothing else builds on them."""
UNFIT = "put that right on this host, or store another network config; it is followed at once"
TRIED_AGAIN = "remove the cause; it is tried again by itself"
UNTRIED = "not tried yet"
SHOWN = 5
"""Ops named in a log line."""


class _Memory(Struct):
    """What the thread remembers between passes."""

    actual: State | None = None
    """None: must be read."""
    kernel_changes: int = 0
    inputs: Inputs | None = None
    departed: Departures = field(default_factory=Departures)
    target: Target | None = None
    worked: Inputs | None = None
    """Of which the target was made."""
    obstacle: Problem | None = None
    """Why these are not `inputs`."""
    settled: bool = False
    """A pass with this desired state ended in sync: what differs now was changed by somebody else."""
    recalled: bool = False
    """It goes by the state of the last run, and what stands may be newer than that: nothing is deleted."""
    newer: set[tuple[Table, Any]] | None = None
    """Rows that stood otherwise then."""
    read_back_at: float = 0.0
    unread_until: float = 0.0
    """Nothing is tried before, as the kernel could not be read."""
    ops: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    failing: Counter[str] = field(default_factory=Counter)
    """Table → rows that are not as they should be, after the last pass."""


class Reconciler:
    """Offers `report`. Sole caller of all drivers."""

    def __init__(
        self,
        executor: Executor,
        settings: Settings,
        inbox: Inbox,
        follow: Callable[[Target], None],
        last_peers: LastPeers | None = None,
    ) -> None:
        """`follow` is told of each new target before anything is written for it."""
        self._executor = executor
        self._last_peers = last_peers
        """Those of the last run, until they have been compared with the registry."""
        self._follow = follow
        self._settings = settings
        self._aim_at = Aim()
        self._inbox = inbox
        self._log = structlog.get_logger().bind(part="reconciler")
        self._memory = _Memory()
        self._rejected = LeftOut(self._log, "peer_rejected", "peers_rejected")
        self._doubtful = LeftOut(self._log, "peer_doubtful", "peers_doubtful")
        self._retry = RetrySchedule()
        self._bucket = TokenBucket(BURST, PER_SECOND, boottime())
        self._questions: SimpleQueue[Future[list[str]]] = SimpleQueue()

    def run(self) -> None:
        """Until the inbox stops. Nothing is removed then: the data plane outlives the daemon."""
        seen = -1
        while not self._inbox.stopped:
            seen, levels = self._inbox.wait(seen, self._wake_at(), first=True)
            if self._inbox.stopped:
                return
            self._answer(levels)
            if not self._has_work(levels):
                continue
            fought_over = levels.kernel_changes != self._memory.kernel_changes
            wait = self._bucket.take(boottime()) if fought_over else 0.0
            if wait:
                self._inbox.pause(wait)
                levels = self._inbox.levels
            first = not levels.report.passes
            self._pass(levels)
            if first and self._inbox.levels.report.passes:
                garbage.settle()

    def ask_plan(self) -> Future[list[str]]:
        """What would be done now, op by op; answered by the thread that owns the drivers."""
        future: Future[list[str]] = Future()
        self._questions.put(future)
        self._inbox.poke()
        return future

    def _wake_at(self) -> float | None:
        if self._memory.target is None:
            return None
        leave = (gone.until for gone in self._memory.departed.kept.values())
        due = (self._retry.next_due(), self._memory.read_back_at, *leave)
        return max(min(at for at in due if at is not None), self._memory.unread_until)

    def _has_work(self, levels: Levels) -> bool:
        inputs, memory = inputs_of(levels, self._memory.inputs), self._memory
        if inputs is None:
            return False
        due = self._wake_at()
        return (
            not same(inputs, memory.inputs)
            or (levels.recalled is not None) != memory.recalled
            or levels.kernel_changes != memory.kernel_changes
            or (due is not None and boottime() >= due)
        )

    def _pass(self, levels: Levels) -> None:
        """Bring the kernel in line with these levels, and report."""
        started, memory = boottime(), self._memory
        inputs = inputs_of(levels, self._memory.inputs)
        if inputs is None:
            return
        if (levels.recalled is not None) != memory.recalled:
            memory.recalled, memory.settled, memory.newer = levels.recalled is not None, False, None
        try:
            target = self._aim(inputs)
            outcomes = self._converge(target, levels)
        except FlanneldError as error:
            if isinstance(error, Unsupported) and not levels.report.subnet_file_written:
                raise  # nothing depends on this process yet, and who set it up is there to see it
            memory.actual, memory.settled = None, False
            memory.read_back_at = memory.unread_until = boottime() + UNREAD_AGAIN
            self._inbox.counts.add("reconcile_failures", "all")
            self._fail(Problem("reconcile-failed", str(error), TRIED_AGAIN))
            return
        self._count(outcomes, inputs, target, boottime() - started)
        memory.target = target._replace(differs=None)  # the tables before need not be kept for it

    def _aim(self, inputs: Inputs) -> Target:
        memory = self._memory
        departed = self._departed(inputs)
        self._log_hold(memory.departed, departed)
        if memory.target is None or not same(inputs, memory.inputs) or departed.kept != memory.departed.kept:
            last, memory.target = memory.target, None
            memory.inputs, memory.departed, self._last_peers = inputs, departed, None
            feasible = self._feasible(inputs, departed)
            memory.target, memory.worked = feasible.target, feasible.inputs
            self._note_obstacle(feasible.obstacle)
            # Somebody else's change may show in the facts about the host as well, and is drift all the same.
            memory.settled = memory.settled and last is not None and last.state == memory.target.state
            self._retry.start_over()
            self._follow(memory.target)
        memory.departed = departed
        return memory.target

    def _departed(self, inputs: Inputs) -> Departures:
        memory, settings, now = self._memory, self._settings, boottime()
        snapshot, own = inputs.snapshot, inputs.own.record.key
        if memory.inputs is not None:
            last = memory.inputs.snapshot
            # Only who has a record no more can have left: most changes are of another kind.
            known = self._peers() if left_since(last, snapshot) else ()
            return departures(memory.departed, last, snapshot, known, now, settings.wipe_grace)
        if self._last_peers is not None:
            last, held, created = self._last_peers
            return departures_since(last, snapshot, own, now, settings.wipe_grace, held, created)
        return Departures()

    def _peers(self) -> Collection[str]:
        """Keys of the records that were peers at the last pass."""
        memory = self._memory
        if memory.target is not None:
            return {record.key for record in memory.target.peers.accepted}
        # That pass failed early: rather keep too much.
        return memory.inputs.snapshot.records.keys() - {memory.inputs.own.record.key} if memory.inputs else ()

    def _log_hold(self, last: Departures, fresh: Departures) -> None:
        """Say when a wipe is held off, and when that is over."""
        before, now = last.held, fresh.held
        if now and not before:
            self._log.warning("wipe_hold", peers=len(now), seconds=self._settings.wipe_grace)
        elif before and not now:
            self._log.info("wipe_hold_over", peers=len(before))

    def _feasible(self, inputs: Inputs, departed: Departures) -> Feasible:
        return feasible_target(
            inputs, self._memory.worked, departed.records, self._settings, self._aim_at.target_of
        )

    def _note_obstacle(self, error: FlanneldError | None) -> None:
        memory, last = self._memory, self._memory.obstacle
        if error is None:
            memory.obstacle = None
            return
        fresh = Problem("reconcile-failed", f"{error}; what worked before stays in force", UNFIT)
        if fresh != last:
            memory.obstacle = fresh
            self._log.error("reconcile_failed", reason=fresh.reason)

    def _converge(self, target: Target, levels: Levels) -> list[Outcome]:
        """Read, plan and apply until the plan is empty or only holds what must wait."""
        memory = self._memory
        if levels.kernel_changes != memory.kernel_changes:
            # An interface that comes back, for one, must not wait for what failed a minute ago.
            self._retry.start_over()
            memory.actual = None
        elif boottime() >= memory.read_back_at:
            memory.actual = None
        memory.kernel_changes = levels.kernel_changes
        outcomes: list[Outcome] = []
        for _ in range(ROUNDS):
            if memory.actual is None:
                memory.actual = share(self._executor.observe(target.scope, APART), target.state)
                memory.read_back_at = boottime() + _read_back_after(memory.actual)
                if self._executor.unread:
                    memory.read_back_at = boottime() + UNREAD_AGAIN
            ops = self._plan(target, memory.actual)
            self._retry.keep_only(map(_retry_key, ops))
            due, held = self._divide(ops, target.state, memory.actual)
            if not due:
                break
            outcomes += self._apply(due, held, target.state, memory.actual)
        return outcomes

    def _plan(self, target: Target, actual: State) -> list[Op]:
        """What can be planned: about what could not be read nothing is known."""
        differs, unread = target.differs, self._executor.unread
        if differs is not None and actual is differs.since:
            ops = plan(differs.want, differs.have)
        else:
            ops = plan(target.state, actual)
        if unread:
            ops = [op for op in ops if op.table not in unread]
        return self._without_withheld(ops, actual)

    def _without_withheld(self, ops: list[Op], actual: State) -> list[Op]:
        memory = self._memory
        if not memory.recalled:
            return ops
        if memory.newer is None:
            memory.newer = {(op.table, op.key) for op in ops if op.key in actual.table(op.table)}
        return [op for op in ops if not is_withheld(op, memory.newer)]

    def _divide(self, ops: Sequence[Op], want: State, actual: State) -> tuple[list[Op], list[Op]]:
        """What is to be tried now, and what must wait: for its time, or for a row that waits."""
        if not self._retry:
            return list(ops), []
        due: list[Op] = []
        held: list[Op] = []
        waiting: dict[tuple[Table, Any], Op] = {}
        lost, now = lost_devices(ops, actual), boottime()
        for op in ops:
            if op.verb == "del" and op.table == "links" and op.value is not None:
                # It makes room for a link: each without the other would fail in turn, without end.
                self._retry.wait_for(_retry_key(op), ("set", "links", op.value.name))
            first = next((waiting[row] for row in referents(op, want) if row in waiting), None)
            if first is not None:
                self._retry.wait_for(_retry_key(op), _retry_key(first))
            elif self._retry.due(_retry_key(op), now):
                due.append(op)
                continue
            held.append(op)
            if op.verb == "set" and (op.key in lost or not self._executor.is_standing(op.table, op.key)):
                waiting[op.table, op.key] = op
        return due, held

    def _apply(self, ops: Sequence[Op], held: Sequence[Op], want: State, actual: State) -> list[Outcome]:
        outcomes = self._executor.apply(ops, want, actual, held)
        now = boottime()
        if self._retry:
            for op, error in outcomes:
                if error is None:
                    self._retry.succeeded(_retry_key(op))
        failed = [op for op, error in outcomes if error is not None]
        for op in failed:
            self._retry.failed(_retry_key(op), now)
        if failed or any(op.table in READ_AGAIN for op in ops):
            self._memory.actual = None
        elif not held and not self._executor.unread and not self._memory.recalled:
            self._memory.actual = want  # all that set them apart is done
        else:
            self._memory.actual = apply_all(actual, ops)
        return outcomes

    def _count(self, outcomes: Sequence[Outcome], inputs: Inputs, target: Target, seconds: float) -> None:
        memory, counts = self._memory, self._inbox.counts
        counts.took("reconcile", seconds)
        for op, error in outcomes:
            if error is not None:
                counts.add("reconcile_failures", op.table)
        done = [op for op, error in outcomes if error is None]
        failed = {op: error for op, error in outcomes if error is not None}
        memory.ops.update(op.verb for op in done)
        if memory.settled and done:
            memory.repaired.update(op.table for op in done)
            self._log.warning("drift_repaired", ops=_shown(done), count=len(done), ms=_ms(seconds))
        elif done:
            verbs = Counter(op.verb for op in done)
            self._log.info(
                "reconciled",
                revision=inputs.snapshot.revision,
                **{"set": verbs["set"], "del": verbs["del"]},
                failed=len(failed),
                ms=_ms(seconds),
            )
        still = self._still_failed(failed, target)
        self._report(target, still)

    def _still_failed(self, failed: dict[Op, str], target: Target) -> tuple[tuple[str, str], ...]:
        """What the plan still holds, with the last error of each."""
        memory = self._memory
        left = list(failed)
        if memory.actual is not None:
            left = self._without_withheld(plan(target.state, memory.actual), memory.actual)
        memory.settled = memory.settled or not left
        memory.failing = Counter(op.table for op in left)
        known, unread = dict(self._inbox.levels.report.failed), self._executor.unread
        rows = tuple(
            (text := describe(op), failed.get(op) or unread.get(op.table) or known.get(text, UNTRIED))
            for op in left
        )
        news = [row for row in rows if known.get(row[0]) != row[1] and row[1] != UNTRIED]
        if news:
            # The first tells the story; with a missing device there may be thousands of them.
            op, error = next((row for row in news if not row[1].startswith(WAITS)), news[0])
            self._log.warning("apply_failed", op=op, error=error, count=len(rows))
        return rows

    def _report(self, target: Target, failed: tuple[tuple[str, str], ...]) -> None:
        memory, last = self._memory, self._inbox.levels.report
        self._rejected.tell(target.peers.rejected)
        self._doubtful.tell(target.peers.doubtful)
        actual = memory.actual.files if memory.actual is not None else {}
        path = self._settings.subnet_file
        left_out = bool(target.peers.rejected or (memory.inputs and memory.inputs.snapshot.bad))
        rows: Mapping[str, int] = last.rows
        if memory.actual is not None:
            rows = {table: len(memory.actual.table(table)) for table in TABLES}
        self._inbox.offer(
            report=Report(
                passes=last.passes + 1,
                in_sync=not failed and memory.obstacle is None,
                problem=memory.obstacle,
                subnet_file_written=last.subnet_file_written or actual.get(path) == target.state.files[path],
                mtu=target.mtu,
                devices=target.devices,
                own_links=frozenset(target.state.links),
                offloads=target.state.offloads,
                rules_by=target.rules_by,
                peers=target.peers,
                snapshot=memory.inputs.snapshot if memory.inputs else None,
                held=len(memory.departed.held),
                held_keys=frozenset(memory.departed.held),
                repaired=dict(memory.repaired),
                ops=dict(memory.ops),
                failed=failed,
                peers_left_out_since=(last.peers_left_out_since or utc_now()) if left_out else "",
                failing_since=(last.failing_since or utc_now()) if failed else "",
                failing=dict(memory.failing),
                failing_from=_since(last) if failed or memory.obstacle else None,
                rows=rows,
                network=memory.worked.network if memory.worked else None,
                subnet_env=target.state.files[path],
            )
        )

    def _fail(self, problem: Problem) -> None:
        last = self._inbox.levels.report
        if problem == last.problem:
            return
        self._log.error("reconcile_failed", reason=problem.reason)
        self._inbox.offer(report=replace(last, in_sync=False, problem=problem, failing_from=_since(last)))

    def _answer(self, levels: Levels) -> None:
        while True:
            try:
                question = self._questions.get_nowait()
            except Empty:
                return
            if not question.set_running_or_notify_cancel():
                continue
            try:
                question.set_result(self._plan_now(levels))
            except FlanneldError as error:
                question.set_exception(error)

    def _plan_now(self, levels: Levels) -> list[str]:
        inputs = inputs_of(levels, self._memory.inputs)
        if inputs is None:
            return []
        target = self._feasible(inputs, self._departed(inputs)).target
        return [describe(op) for op in self._plan(target, self._executor.observe(target.scope, APART))]


def _since(last: Report) -> float:
    """Since when something fails, given that it does now."""
    return boottime() if last.failing_from is None else last.failing_from


def _read_back_after(state: State) -> float:
    return READ_BACK_SMALL if len(state.routes) <= SMALL_STATE else READ_BACK_LARGE


def _retry_key(op: Op) -> tuple[Verb, Table, Any]:
    return op.verb, op.table, op.key


def _shown(ops: Sequence[Op]) -> list[str]:
    return [describe(op) for op in ops[:SHOWN]]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
