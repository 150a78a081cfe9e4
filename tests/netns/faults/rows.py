"""The rows of the fault matrix: a fault, what must hold during it, and what was measured.

A test does it like this; everything is checked where it is called:

```
with fault("etcd frozen", "vxlan", check="registry", says="unreachable", expected="peers stay") as row:
    row.stands(alpha, beta)  # from now on their kernel stays as it is, and no ping between them is lost
    lab.etcd.pause()
    row.seen(alpha, beta)  # within five seconds, on every surface
    row.endures()  # at little cost
    lab.etcd.resume()
    row.recovered(alpha, beta)  # within five seconds
```
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flanneld_py.lab import wait_for
from tests.netns.faults.surfaces import Surfaces, command_is_well, command_says
from tests.netns.observing import cpu_seconds, start_pings
from tests.netns.oracle import actual, differences

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from flanneld_py.lab import Daemon, Host, PingRun

TOLD_WITHIN = 5.0
BACK_WITHIN = 5.0
AFTER_A_NEW_LEADER = 10.0
"""Seconds; the promises."""
MOST_CPU = 0.05
"""Of one core."""
MOST_LINES = 200 / 3600
"""In the log, a second."""
LOOK_AGAIN = 5.0
"""Seconds."""


@dataclass(slots=True)
class Measured:
    """One row of the table; None is what was not measured, as it does not apply."""

    fault: str
    backend: str
    expected: str
    check: str | None
    test: str = field(default_factory=lambda: os.environ["PYTEST_CURRENT_TEST"].partition(" (")[0])
    told: float | None = None
    """Seconds from the fault until every surface told of it."""
    recovered: float | None = None
    """Seconds from the cure until all was well."""
    lost: int | None = None
    """Packets."""
    cpu: float | None = None
    """Of one core, while it lasted."""
    holds: bool = False
    """Whether everything was as expected."""
    at: float = field(default_factory=time.time)

    def line(self) -> str:
        """For people."""
        told = [f"told after {self.told:.1f} s"] if self.told is not None else []
        told += [f"well after {self.recovered:.1f} s"] if self.recovered is not None else []
        told += [f"{self.lost} packets lost"] if self.lost is not None else []
        return f"{self.fault}, {self.backend}: {', '.join(told)}"


class Row:
    """A fault while it is tried. See above; everything is checked where it is called."""

    def __init__(
        self,
        fault: str,
        backend: str,
        *,
        expected: str,
        check: str | None,
        says: str = "",
        logged: str = "",
        told_within: float = TOLD_WITHIN,
        back_within: float = BACK_WITHIN,
    ) -> None:
        """See the fixture `fault`."""
        assert (check is None) == (not says), "a check says something, and what is repaired has none"
        self.measured = Measured(fault, backend, expected, check)
        self._backend = backend.split(maxsplit=1)[0]
        self._says = says
        self._logged = logged or says
        self._told_within = told_within
        self._back_within = back_within
        self._injected = time.monotonic()
        self._cured: float | None = None
        self._looked = 0.0
        """When the last look at the hosts began, which takes some time."""
        self._lines: dict[int, int] = {}
        """Pid → lines in its log before the fault."""
        self._standing: dict[Host, dict[str, str]] = {}
        self._pings: list[PingRun] = []

    def stands(self, *hosts: Host, rows: bool = True) -> None:
        """From now to the end of the fault the kernel of these stays as it is, and no ping is lost.

        The first one has a ping under way to each of the others. `rows`: False where the kernel may change.
        """
        for host in hosts:
            self._lines[host.daemon.pid] = len(host.daemon.log_lines())
            self._standing[host] = actual(host, self._backend) if rows else {}
        self._pings += [start_pings(hosts[0], other) for other in hosts[1:]]
        self.injected()

    def injected(self) -> None:
        """The fault begins now; else it is when `stands` was done."""
        self._injected = time.monotonic()

    def seen(self, *hosts: Host, passes: bool = False) -> None:
        """Until all surfaces of these agree that the fault is there.

        `passes`: it is over by itself so soon that `flannelctl status`, a program to be started, may miss it.
        """
        check = self.measured.check
        assert check is not None, "nothing fails with this fault"

        def missing() -> list[str]:
            self._looked = time.monotonic()
            return [f"{host.name}: {line}" for host in hosts for line in self._silences(host, check)]

        left = self._told_within - (time.monotonic() - self._injected)
        wait_for(missing, left, f"all surfaces to tell of: {self.measured.fault}", lambda seen: not seen, 0.1)
        self.measured.told = self._looked - self._injected
        for host in hosts if not passes else ():
            problem = command_says(host, self._says)
            assert not problem, problem
        self.assert_standing()

    def _silences(self, host: Host, check: str) -> list[str]:
        surfaces = Surfaces.of(host)
        first = self._lines.get(host.daemon.pid, 0)
        return [*surfaces.silent(check, self._says, self._logged, first), *surfaces.contradictions()]

    def endures(self, *hosts: Host, seconds: float = 3.0) -> None:
        """So long the fault lasts, at little cost to these, or to those that stand.

        What there is to say was said when it was seen: of what follows a line may fall into any few seconds.
        """
        hosts = hosts or tuple(self._standing)
        before = {host: _Effort.of(host.daemon) for host in hosts}
        time.sleep(seconds)
        for host in hosts:
            spent = _Effort.of(host.daemon)
            lines, cpu = spent.lines - before[host].lines, (spent.cpu - before[host].cpu) / seconds
            assert lines <= 1 + seconds * MOST_LINES, host.daemon.log_tail(lines)
            assert cpu < MOST_CPU, f"{host.name} used {100 * cpu:.1f} % of a core over {seconds} s"
            self.measured.cpu = max(self.measured.cpu or 0, cpu)
        self.assert_standing()

    def cured(self) -> None:
        """The cure is complete now; else it is when `recovered` is called."""
        self._cured = time.monotonic()

    def recovered(self, *hosts: Host, kernel: bool = True, **options: Any) -> None:
        """Until everything is well with these, the kernel as well unless told otherwise. Ends the pings.

        Options are those of the oracle's `wait_in_order`.
        """
        begun = self._cured if self._cured is not None else time.monotonic()

        def wrong() -> list[str]:
            self._looked = time.monotonic()
            return [f"{host.name}: {line}" for host in hosts for line in self._wrongs(host, options, kernel)]

        left = self._back_within - (time.monotonic() - begun)
        wait_for(wrong, left, f"recovery from: {self.measured.fault}", lambda seen: not seen, 0.05)
        self.measured.recovered = self._looked - begun
        for host in hosts:
            problem = command_is_well(host)
            assert not problem, problem
        self.assert_standing()
        self._end_pings()

    def _wrongs(self, host: Host, options: dict[str, Any], kernel: bool = True) -> list[str]:
        surfaces = Surfaces.of(host)
        wrong = [*surfaces.troubles(), *surfaces.contradictions()]
        if wrong or not kernel:
            return wrong
        foreign = {f"+ {what}: {how}" for what, how in options.get("beside", {}).items()}
        known = {name: value for name, value in options.items() if name != "beside"}
        return [line for line in differences(host, self._backend, **known) if line not in foreign]

    def repaired(self, host: Host, *tables: str) -> None:
        """It was put right before a check could fail: metrics, status and log say so, and all is well.

        Measured from the fault. `tables`: in which something must have been repaired.
        """
        assert self.measured.check is None, "a check was to fail"

        def wrong() -> list[str]:
            self._looked = time.monotonic()
            surfaces = Surfaces.of(host)
            left = [f"no repair of {t} is told" for t in tables if not surfaces.repairs().get(t)]
            logged = [line for line in surfaces.log if line["event"] == "drift_repaired"]
            return [*left, *([] if logged or not tables else ["nor is it logged"]), *self._wrongs(host, {})]

        left = self._back_within - (time.monotonic() - self._injected)
        wait_for(wrong, left, f"repair of: {self.measured.fault}", lambda seen: not seen, 0.05)
        self.measured.recovered = self._looked - self._injected

    def took(self, seconds: float) -> None:
        """What was measured in another way, from the cure to the end of all trouble."""
        self.measured.recovered = seconds

    def assert_standing(self) -> None:
        """As `stands` demands. What packets show may need another look: one may be lost to who looks."""
        for host, rows in self._standing.items():
            patience = LOOK_AGAIN if self._backend == "udp" else 0
            stands = partial(self._changed, host, rows)
            wait_for(stands, patience, f"{host.name} to be as it was", lambda changed: not changed)

    def _changed(self, host: Host, rows: dict[str, str]) -> dict[str, tuple[str, str | None]]:
        """Row → how it was, and how it is."""
        now = actual(host, self._backend) if rows else {}
        return {what: (how, now.get(what)) for what, how in rows.items() if now.get(what) != how}

    def loses(self, *pings: PingRun) -> None:
        """These are ended, and what they lost is told: more than that nothing may be said about them."""
        lost = [len(ping.stop().lost) for ping in pings]
        self.measured.lost = sum(lost) + (self.measured.lost or 0)

    def _end_pings(self) -> None:
        lost = [ping.stop().lost for ping in self._pings]
        if self._pings:
            self.measured.lost = sum(map(len, lost)) + (self.measured.lost or 0)
        self._pings = []
        assert not any(lost), f"pings lost: {lost}"


class Matrix:
    """Makes rows, and writes down those that are over."""

    def __init__(self, path: Path | None, tell: Callable[[str], None]) -> None:
        self._path = path
        self._tell = tell

    def __call__(self, fault: str, backend: str, **more: Any) -> Trial:
        """A context manager that gives the Row."""
        return Trial(Row(fault, backend, **more), self)

    def record(self, measured: Measured) -> None:
        self._tell(measured.line() if measured.holds else f"FAILED: {measured.line()}")
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(measured)) + "\n")


class Trial:
    """A fault that is about to be tried."""

    def __init__(self, row: Row, matrix: Matrix) -> None:
        self._row = row
        self._matrix = matrix

    def __enter__(self) -> Row:
        return self._row

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._row.measured.holds = kind is None
        self._matrix.record(self._row.measured)


@dataclass(frozen=True, slots=True)
class _Effort:
    """What a daemon has spent until now; of CPU in seconds, of all its threads."""

    lines: int
    cpu: float

    @classmethod
    def of(cls, daemon: Daemon) -> Self:
        return cls(len(daemon.log_lines()), cpu_seconds(daemon.pid))
