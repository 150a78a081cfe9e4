"""Carries a schedule out: faults, heal, wait, check."""

from __future__ import annotations

import heapq
import itertools
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import LabError, WaitTimeout, wait_for
from flanneld_py.lab import daemon as lab_daemon
from tests.chaos.fault import FOREVER, Impossible
from tests.chaos.faults import CATALOGUE
from tests.chaos.foreign import foreign_rows, own_rules
from tests.chaos.recording import End, Recording
from tests.chaos.report import ROOT
from tests.chaos.schedule import fill
from tests.chaos.watchers import Watchers
from tests.chaos.windows import Done, windows
from tests.chaos.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host
    from tests.chaos.fault import Fault, Heal
    from tests.chaos.schedule import Schedule, Step

CONVERGES_WITHIN = 60.0
"""Seconds after the last heal; longer than anything that is promised, as everything was harmed at once."""
MUTANTS = "tests.chaos.mutants"
HEAL_AGAIN = 1.0
"""Seconds until what could not be healed is tried again."""
QUIET = 6.0
"""Seconds of traffic with nothing wrong, before it is checked that nothing changes."""
TEND_EVERY = 0.5
WARM_UP = 2.0


def run(
    schedule: Schedule,
    check: Callable[[World, Recording], None],
    *,
    tell: Callable[[str], None] = lambda _: None,
    mutant: str = "",
    later: bool = False,
    patience: float = CONVERGES_WITHIN,
) -> None:
    """One run; `check` is called while its hosts and files still stand.

    Args:
        schedule: what is to happen.
        check: gets what was seen.
        tell: gets a line for each fault.
        mutant: one of tests.chaos.mutants, in the place of the daemon …
        later: … but not of those that are there in the beginning.
        patience: seconds after the last heal in which all must be well.
    """
    command = lab_daemon.COMMAND
    mutated = (sys.executable, "-m", MUTANTS, mutant) if mutant else command
    try:
        lab_daemon.COMMAND = command if later else mutated
        with World(schedule) as world:
            lab_daemon.COMMAND = mutated
            check(world, Engine(world, schedule, tell, mutant, patience).run())
    finally:
        lab_daemon.COMMAND = command


@dataclass(slots=True)
class Running:
    """A fault that was caused."""

    step: Step
    heal: Heal


class Engine:
    """One run of a schedule over a world."""

    def __init__(
        self, world: World, schedule: Schedule, tell: Callable[[str], None], mutant: str, patience: float
    ) -> None:
        self._world, self._schedule, self._tell = world, schedule, tell
        self._mirror = [MUTANTS, mutant, "mirror"] if mutant else ["tests.chaos.mirror"]
        self._patience = patience
        self._done: dict[int, Done] = {}
        self._skipped: list[str] = []
        self._unhealed: dict[int, set[str]] = {}
        """Step that could not be healed yet → its targets."""
        self._began = 0.0
        self._order = itertools.count()

    def run(self) -> Recording:
        world = self._world
        mirror = [sys.executable, "-m", *self._mirror, world.etcd.prefix]
        endpoints = world.etcd.cluster.endpoint.split(",")
        following = world.lab.underlay.spawn("mirror", [*mirror, *endpoints], env={"PYTHONPATH": str(ROOT)})
        watchers = Watchers(world)
        time.sleep(WARM_UP)
        before = {host.name: (foreign_rows(host), own_rules(host)) for host in world.lab.hosts}
        self._began = time.monotonic()
        self._cause_all()
        self._heal_all()
        healed = time.monotonic()
        differences = self._wait(healed)
        settled = time.monotonic()
        time.sleep(QUIET)
        ends = [self._end(host, self._known(host, before), differences) for host in world.lab.hosts]
        stopped = time.monotonic()
        flows = world.probes.flows()
        world.etcd.history.finish()
        self._await_mirror(following)
        watchers.stop()
        for host in world.lab.hosts:
            world.count_astray(host.name)
        leases = world.etcd.leases()
        self._stop_daemons()
        done = list(self._done.values())
        return Recording(
            schedule=self._schedule,
            hosts={
                host.name: host.node_id for host in world.lab.hosts if host.name not in world.notes.joined
            },
            began=self._began,
            healed=healed,
            settled=settled,
            stopped=stopped,
            done=done,
            windows=windows(done, world.names, self._schedule.setting.ttl),
            traffic=world.probes.read(),
            flows=flows,
            events=world.etcd.history.events,
            history_gaps=world.etcd.history.gaps,
            etcd_leases=leases,
            mirror=_whole_lines(following.stdout.read_text()),
            seen=watchers.seen,
            routes_gone=watchers.routes_gone(),
            notes=world.notes,
            ends=ends,
            skipped=self._skipped,
        )

    # --- faults, heal ----------------------------------------------------------------------------

    def _cause_all(self) -> None:
        queue: list[tuple[float, int, Step | Running]] = [
            (step.at, next(self._order), step) for step in self._schedule.steps
        ]
        heapq.heapify(queue)
        while queue:
            at, _, what = heapq.heappop(queue)
            self._pass_time_until(at)
            if isinstance(what, Running):
                if not self._heal(what):
                    heapq.heappush(queue, (at + HEAL_AGAIN, next(self._order), what))
            elif (running := self._cause(what)) is not None:
                heapq.heappush(queue, (what.heals_at, next(self._order), running))
        self._pass_time_until(self._schedule.setting.seconds)

    def _pass_time_until(self, at: float) -> None:
        while (left := self._began + at - time.monotonic()) > 0:
            time.sleep(min(left, TEND_EVERY))
            self._world.tend()

    def _cause(self, step: Step) -> Running | None:
        fault = CATALOGUE[step.fault]
        start = time.monotonic()
        # It stands here from its beginning: what fails half-way may have done harm.
        self._done[step.number] = self._as_done(step, fault, start)
        try:
            heal = self._inject(fault, step)
        except Impossible as reason:
            self._skip(step, str(reason))
            heal = None
        except LabError as reason:
            self._skip(step, f"{reason}")
            heal = None
        self._tell(f"{start - self._began:7.1f}  {step.fault} {' '.join(step.targets)}")
        if heal is None:
            self._done[step.number] = replace(self._done[step.number], healed=time.monotonic())
            return None
        return Running(step, heal)

    def _inject(self, fault: Fault, step: Step) -> Heal | None:
        if any(targets & {*step.targets} for targets in self._unhealed.values()):
            raise Impossible("what was done to it before is not undone yet")
        return fault.inject(self._world, step)

    def _skip(self, step: Step, reason: str) -> None:
        self._skipped.append(f"{step}: {reason}")

    def _as_done(self, step: Step, fault: Fault, start: float) -> Done:
        def filled(*templates: str) -> frozenset[str]:
            return frozenset(name for each in templates if each for name in fill(each, step.targets))

        udp = self._world.backend == "udp"
        return Done(
            number=step.number,
            fault=step.fault,
            targets=step.targets,
            start=start,
            healed=FOREVER,
            grace=fault.grace,
            breaks=filled(fault.breaks, fault.udp_breaks if udp else ""),
            latent=fault.latent,
            needs=filled(*fault.needs),
            disables=filled(*fault.disables),
            disables_for=fault.disables_for,
            stirs=filled(fault.stirs),
            told_after=fault.told_after,
        )

    def _heal(self, running: Running) -> bool:
        """Whether it could be: some heals need an etcd that answers."""
        number = running.step.number
        try:
            running.heal()
        except Impossible:
            self._unhealed[number] = {*running.step.targets}
            return False
        self._unhealed.pop(number, None)
        self._done[number] = replace(self._done[number], healed=time.monotonic())
        at = time.monotonic() - self._began
        self._tell(f"{at:7.1f}    healed: {running.step.fault} {' '.join(running.step.targets)}")
        return True

    def _heal_all(self) -> None:
        world = self._world
        world.etcd.make_whole()
        for name in world.names:
            world.start_daemon(name)

    # --- wait, check -----------------------------------------------------------------------------

    def _wait(self, healed: float) -> dict[str, tuple[list[str], str]]:
        """Until every host is in order and says so; else what is wrong. Host → differences, status.

        Connections rest for a while after an outage, so they are waited for as well.
        """

        def look() -> dict[str, tuple[list[str], str]]:
            self._world.tend()
            return {
                host.name: found
                for host in self._world.lab.hosts
                if any(found := (self._world.differences(host), _complaint(host)))
            }

        def resting() -> bool:
            return any(not flow.broken and flow.progress < healed for flow in self._world.probes.flows())

        try:
            wait_for(resting, self._patience, "connections to go on", lambda found: not found, 0.5)
        except WaitTimeout:
            self._tell("some connections rest")
        try:
            return wait_for(look, self._patience, "all to be well", lambda wrong: not wrong, 0.2)
        except WaitTimeout:
            return look()

    def _known(self, host: Host, before: dict[str, Any]) -> Any:
        """What the host was like; None: it came later, or began anew."""
        return None if host.name in self._world.notes.booted else before.get(host.name)

    def _end(self, host: Host, before: Any, wrong: dict[str, tuple[list[str], str]]) -> End:
        # A newcomer had nothing before.
        foreign, rules = before or (foreign_rows(host), own_rules(host))
        differences, complaint = wrong.get(host.name, ([], ""))
        text = "".join(daemon.log_text() for daemon in host.daemons)
        return End(
            host=host.name,
            differences=differences or self._world.differences(host),
            status=complaint or _complaint(host),
            foreign_before=foreign,
            foreign_after=foreign_rows(host),
            rules_before=rules,
            rules_after=own_rules(host),
            log_lines=len(text.splitlines()),
            tracebacks=[text[place : place + 1500] for place in (text.find("Traceback"),) if place >= 0],
        )

    def _await_mirror(self, following: Any) -> None:
        newest = f'"revision": {self._world.etcd.history.revision}'
        with suppress(WaitTimeout):
            wait_for(
                lambda: newest in following.stdout.read_text() or not following.running, 15, "the mirror"
            )

    def _stop_daemons(self) -> None:
        """Where the seed says so while etcd hangs."""
        world = self._world
        if self._schedule.setting.seed % 3 == 0:
            for name in ("0", "1", "2"):
                world.etcd.signal(name, signal.SIGSTOP)
        for name in world.names:
            world.stop_daemon(name)


def _complaint(host: Host) -> str:
    """What is wrong by the daemon's own account."""
    try:
        status = host.daemon.status()
    except (LabError, ValueError) as error:
        return f"no status: {error}"
    if status and status["state"] == "in sync" and status["ready"] and not status["problems"]:
        return ""
    return f"{status.get('state')}, ready={status.get('ready')}, {status.get('problems')}"


def _whole_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]
