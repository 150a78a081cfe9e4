"""The one thread that writes the kernel: makes it what should be, and looks again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, get_args

import structlog

from flanneld_py.core.describe import WAITS, describe
from flanneld_py.core.linger import Departures, departures, departures_since
from flanneld_py.core.pace import RetrySchedule, TokenBucket
from flanneld_py.core.plan import apply_all, lost_devices, plan, referents
from flanneld_py.daemon.execute import Executor
from flanneld_py.daemon.inbox import Inbox, Levels, Problem, Report, boottime, utc_now
from flanneld_py.daemon.leftout import LeftOut
from flanneld_py.daemon.target import Feasible, Inputs, Settings, Target, feasible_target, inputs_of, same
from flanneld_py.errors import FlanneldError, Unsupported
from flanneld_py.model import Op, Outcome, State, Table, Verb

ROUNDS = 5
"""Within one pass: the kernel cascades (a link going down takes its routes along), so read and plan again."""
BURST, PER_SECOND = 10, 10.0
"""Of passes: firewalls that reload five times a second must not outrun the repair."""
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


@dataclass(slots=True)
class _Memory:
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
    read_back_at: float = 0.0
    ops: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    failing: Counter[str] = field(default_factory=Counter)
    """Table → rows that are not as they should be, after the last pass."""


class Reconciler:
    """Offers `report`. Sole caller of all drivers."""

    def __init__(
        self, executor: Executor, settings: Settings, inbox: Inbox, follow: Callable[[Target], None]
    ) -> None:
        """`follow` is told of each new target before anything is written for it."""
        self._executor = executor
        self._follow = follow
        self._settings = settings
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
            seen, levels = self._inbox.wait(seen, self._wake_at())
            if self._inbox.stopped:
                return
            self._answer(levels)
            if not self._has_work(levels):
                continue
            wait = self._bucket.take(boottime())
            if wait:
                self._inbox.pause(wait)
                levels = self._inbox.levels
            self._pass(levels)

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
        return min(at for at in due if at is not None)

    def _has_work(self, levels: Levels) -> bool:
        inputs, memory = inputs_of(levels, self._memory.inputs), self._memory
        if inputs is None:
            return False
        due = self._wake_at()
        return (
            not same(inputs, memory.inputs)
            or levels.kernel_changes != memory.kernel_changes
            or (due is not None and boottime() >= due)
        )

    def _pass(self, levels: Levels) -> None:
        """Bring the kernel in line with these levels, and report."""
        started, memory = boottime(), self._memory
        inputs = inputs_of(levels, self._memory.inputs)
        if inputs is None:
            return
        try:
            target = self._aim(inputs)
            outcomes = self._converge(target, levels)
        except FlanneldError as error:
            if isinstance(error, Unsupported) and not levels.report.subnet_file_written:
                raise  # nothing depends on this process yet, and who set it up is there to see it
            memory.actual, memory.settled = None, False
            memory.read_back_at = boottime() + UNREAD_AGAIN
            self._inbox.counts.add("reconcile_failures", "all")
            self._fail(Problem("reconcile-failed", str(error), TRIED_AGAIN))
            return
        self._count(outcomes, inputs, target, boottime() - started)

    def _aim(self, inputs: Inputs) -> Target:
        memory = self._memory
        departed = self._departed(inputs)
        self._log_hold(memory.departed, departed)
        if memory.target is None or not same(inputs, memory.inputs) or departed.kept != memory.departed.kept:
            last, memory.target = memory.target, None
            memory.inputs, memory.departed = inputs, departed
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
            return departures(memory.departed, last, snapshot, self._peers(), now, settings.wipe_grace)
        if settings.last_peers is not None:
            return departures_since(settings.last_peers, snapshot, own, now, settings.wipe_grace)
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
        return feasible_target(inputs, self._memory.worked, departed.records, self._settings)

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
                memory.actual = self._executor.observe(target.scope, APART)
                memory.read_back_at = boottime() + _read_back_after(memory.actual)
                if self._executor.unread:
                    memory.read_back_at = boottime() + UNREAD_AGAIN
            ops = self._plan(target.state, memory.actual)
            self._retry.keep_only(map(_retry_key, ops))
            due, held = self._divide(ops, target.state, memory.actual)
            if not due:
                break
            outcomes += self._apply(due, held, target.state, memory.actual)
        return outcomes

    def _plan(self, want: State, actual: State) -> list[Op]:
        """What can be planned: about what could not be read nothing is known."""
        return [op for op in plan(want, actual) if op.table not in self._executor.unread]

    def _divide(self, ops: Sequence[Op], want: State, actual: State) -> tuple[list[Op], list[Op]]:
        """What is to be tried now, and what must wait: for its time, or for a row that waits."""
        due: list[Op] = []
        held: list[Op] = []
        waiting: dict[tuple[Table, Any], Op] = {}
        lost, now = lost_devices(ops, actual), boottime()
        for op in ops:
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
        for op, error in outcomes:
            if error is None:
                self._retry.succeeded(_retry_key(op))
            else:
                self._retry.failed(_retry_key(op), now)
        if any(error is not None or op.table in READ_AGAIN for op, error in outcomes):
            self._memory.actual = None
        else:
            self._memory.actual = apply_all(actual, [op for op, _ in outcomes])
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
        left = plan(target.state, memory.actual) if memory.actual is not None else list(failed)
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
                held=len(memory.departed.held),
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
        return [describe(op) for op in self._plan(target.state, self._executor.observe(target.scope, APART))]


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
