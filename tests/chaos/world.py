"""Hosts with a daemon and a pod each, under traffic, and the hands that faults need."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from flanneld_py.lab import CommandFailed, Lab, LabError, wait_for
from flanneld_py.lab import daemon as lab_daemon
from flanneld_py.lab.process import command_line, descendants
from tests.chaos.etcd_hands import EtcdHands
from tests.chaos.fault import Impossible
from tests.chaos.foreign import ORACLE_SEES, add_foreign, astray
from tests.chaos.probes import Probes
from tests.chaos.schedule import HOSTS
from tests.netns.false_clock import FalseClock
from tests.netns.oracle import differences, wait_in_order
from tests.netns.scenes import family_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flanneld_py.lab import Daemon, Host
    from flanneld_py.lab.process import Process
    from tests.chaos.schedule import Schedule

READY_WITHIN = 60.0
STARTED, STARTS_WITHIN = '"external_interface"', 15.0
"""What the log says when a daemon has found its interface; seconds."""
FIRST_SUBNET = 100
"""Third number of the first one that is leased."""
WIPE_GRACE = 10
SECOND = "second"
GIVEN_UP_AFTER = 15.0
"""Seconds after SIGTERM."""
SEGMENTS = {"vxlan-direct": {"delta": 1, "epsilon": 1}}
"""Backend → hosts that are on the second segment of the underlay."""
NEAR = {0: ("192.0.2.0/24", "2001:db8::/64"), 1: ("198.51.100.0/24", "2001:db8:0:1::/64")}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a daemon ended."""

    host: str
    at: float
    asked: str
    """SIGTERM, SIGKILL, SECOND: it was one too many, or empty: nobody asked."""
    code: int
    took: float
    """Seconds."""


@dataclass(slots=True)
class Notes:
    """What was done to hosts and what came of it, for the checks."""

    exits: list[Exit] = field(default_factory=list)
    spoiled: dict[str, list[float]] = field(default_factory=dict)
    """Host → when its subnet.env was harmed by us."""
    astray: dict[str, int] = field(default_factory=dict)
    """Host → probes that reached it although they were for another one."""
    booted: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)
    """Hosts that came later."""


class World:
    """Made of a schedule's setting; a context manager."""

    def __init__(self, schedule: Schedule) -> None:
        self.setting = schedule.setting
        self.lab = Lab()
        self.notes = Notes()
        self._dropped: dict[object, Sequence[str]] = {}
        self._expected_down: set[str] = set()
        self._clocks: dict[str, FalseClock] = {}
        self._numbers = 0
        self.on_boot: Callable[[Host], None] = lambda _: None
        """Called when a host has a network again."""
        try:
            self.etcd = EtcdHands(self.lab)
        except BaseException:
            self.lab.close()
            raise
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        self.etcd.history.close()
        self.lab.close()

    def _set_up(self) -> None:
        options: dict[str, Any] = {"DirectRouting": True} if self.setting.backend == "vxlan-direct" else {}
        config = family_config(self.backend, self.setting.families, **options) | {"EnableNFTables": True}
        config["SubnetMax"] = f"10.5.{FIRST_SUBNET + self.setting.pool - 1}.0"
        self.config_text = json.dumps(config)
        self.etcd.cluster.put_config(self.config_text)
        self.probes = Probes(self.lab.workspace.directory / "probes")
        hosts = [self._add_host(name) for name in HOSTS]
        for host in hosts:
            self._launch(host)
        for host in hosts:
            host.daemon.wait_ready(READY_WITHIN)
            self._populate(host)
        for host in hosts:
            wait_in_order(host, self.backend, READY_WITHIN, ORACLE_SEES, direct=self.direct(host))
        for host in hosts:
            self._join_in(host)

    def _join_in(self, host: Host) -> None:
        """Probes of its pod, and connections with its neighbours in the ring that have pods, too."""
        self.probes.add(host)
        place = HOSTS.index(host.name)
        neighbours = [self.host(HOSTS[place - 1]), self.host(HOSTS[(place + 1) % len(HOSTS)])]
        for source, target in ((neighbours[0], host), (host, neighbours[1])):
            if source.pods and target.pods:
                self.probes.connect(source, target)

    def _add_host(self, name: str) -> Host:
        segment = SEGMENTS.get(self.setting.backend, {}).get(name, 0)
        # Never one that another host has had: it may have kept the MAC that goes with it.
        self._numbers += 1
        host = self.lab.add_host(name, self._numbers, segment=segment)
        if self.backend == "udp":
            host.keep_descriptors()
        return host

    def _populate(self, host: Host) -> None:
        (pod,) = host.attach_pods()
        # Retries soon and often, as after an outage a connection otherwise rests for as long as that took.
        # The second one needs Linux 6.15.
        pod.sysctl(
            {
                "net.ipv4.tcp_thin_linear_timeouts": 1,
                "net.ipv4.tcp_rto_max_ms": 1000,
                "net.ipv4.tcp_retries2": 250,
            }
        )
        add_foreign(host)

    @property
    def backend(self) -> str:
        """Type, as in the config."""
        return self.setting.backend.removesuffix("-direct")

    @property
    def flags(self) -> list[str]:
        """Of every daemon, besides the lab's own."""
        return [
            "--ip-masq",
            f"--subnet-lease-ttl={self.setting.ttl}s",
            f"--registry-wipe-grace={WIPE_GRACE}s",
            *(["--ip-blackhole-route"] if self.setting.seed % 2 else []),
        ]

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.lab.hosts]

    def host(self, name: str) -> Host:
        return next(host for host in self.lab.hosts if host.name == name)

    def direct(self, host: Host) -> Sequence[str]:
        """Prefixes whose hosts it reaches without a tunnel."""
        return NEAR[host.segment] if self.setting.backend == "vxlan-direct" else ()

    def differences(self, host: Host) -> list[str]:
        """Where the host's kernel is not as the registry demands, a line each."""
        try:
            found = differences(host, self.backend, direct=self.direct(host))
        except (CommandFailed, StopIteration, KeyError, ValueError) as error:
            return [f"it could not be compared: {error!r}"]
        beside = {f"+ {what}: {how}" for what, how in ORACLE_SEES.items()}
        return sorted({*found} ^ beside)

    # --- daemons ---------------------------------------------------------------------------------

    def clock(self, name: str) -> FalseClock:
        """That of a host's daemons, and of nothing else."""
        if name not in self._clocks:
            directory = self.host(name).directory / "clock"
            directory.mkdir()
            self._clocks[name] = FalseClock(directory)
        return self._clocks[name]

    def _launch(self, host: Host, *flags: str) -> Daemon:
        return host.start_daemon([*self.flags, *flags], env=self.clock(host.name).environment)

    def start_daemon(self, name: str) -> None:
        """If none runs."""
        host = self.host(name)
        self._expected_down.discard(name)
        if not host.daemon.running:
            daemon = self._launch(host)
            # Without the interface that it is told to use it ends: what is to happen to that comes later.
            wait_for(
                lambda: not daemon.running or STARTED in daemon.log.read_text(), STARTS_WITHIN, "its start"
            )

    def kill_daemon(self, name: str) -> None:
        self._end(name, signal.SIGKILL)

    def stop_daemon(self, name: str) -> None:
        self._end(name, signal.SIGTERM)

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self.host(name).daemon
        self.note_exits()
        self._expected_down.add(name)
        if not daemon.running:
            return
        began = time.monotonic()
        with suppress(LabError, ProcessLookupError):
            daemon.send_signal(number)
        try:
            code = daemon.wait_exit(GIVEN_UP_AFTER)
        except LabError:
            code = daemon.kill()
        took = time.monotonic() - began
        self.notes.exits.append(Exit(name, began, number.name, code, took))

    def note_exits(self) -> None:
        """Of daemons that nobody has asked to end."""
        for host in self.lab.hosts:
            if host.name not in self._expected_down and host.daemons and not host.daemon.running:
                self._expected_down.add(host.name)
                code = host.daemon.wait_exit(1)
                self.notes.exits.append(Exit(host.name, time.monotonic(), "", code, 0))

    def signal_worker(self, name: str, number: signal.Signals) -> None:
        """To the process that forwards packets for backend udp."""
        daemon = self.host(name).daemon
        if not daemon.running:
            raise Impossible("no daemon runs")
        for pid in descendants(daemon.process.pid):
            if any(part.endswith("udp/worker.py") for part in command_line(pid)):
                os.kill(pid, number)
                return
        raise Impossible("it has no worker")

    def start_dying(self, name: str, writes: int) -> None:
        """The daemon, which dies after so many writes."""
        usual = lab_daemon.COMMAND
        self._expected_down.add(name)
        lab_daemon.COMMAND = (sys.executable, "-m", "tests.netns.die_at", str(writes), "daemon")
        try:
            self._launch(self.host(name))
        finally:
            lab_daemon.COMMAND = usual

    def start_second(self, name: str) -> Process:
        """Another daemon beside the one that runs."""
        host = self.host(name)
        return host.spawn("second", [*lab_daemon.COMMAND, *host.flags, *self.flags])

    def note_second(self, name: str, second: Process) -> None:
        """What became of it."""
        code = second.wait(0.1) if not second.running else second.kill()
        self.notes.exits.append(Exit(name, time.monotonic(), SECOND, code, 0))

    def spoil(self, name: str) -> None:
        """Note that its subnet.env is about to be harmed."""
        self.notes.spoiled.setdefault(name, []).append(time.monotonic())

    # --- hosts that come and go ------------------------------------------------------------------

    def join(self, name: str, *flags: str, node_id: str = "") -> None:
        """`node_id`: another host's, instead of one of its own."""
        host = self._add_host(name)
        host.node_id = node_id or host.node_id
        self.notes.joined.add(name)
        self._launch(host, *flags)

    def tend(self) -> None:
        """Give pods to hosts that came and are ready; look who has ended."""
        self.note_exits()
        for host in self.lab.hosts:
            if not host.pods and host.name not in self._expected_down and host.gateways():
                self._populate(host)
                if host.name in HOSTS:
                    self._join_in(host)

    def reboot(self, name: str) -> None:
        """The host comes back with nothing but its disk, and starts its daemon."""
        host = self.host(name)
        self.kill_daemon(name)
        self.probes.remove(host)
        self.count_astray(name)
        self.spoil(name)
        self.notes.booted.add(name)
        host.reboot()
        if self.backend == "udp":
            host.keep_descriptors()
        self.on_boot(host)
        self.start_daemon(name)

    def leave(self, name: str, *, its_record: bool = True) -> None:
        """For good: its daemon is stopped, its record deleted if it had one, the machine scrapped."""
        host = self.host(name)
        self.stop_daemon(name)
        if its_record and self.etcd.has_had_record(host):
            self.etcd.ctl("del", self.etcd.own_path(host))
        self.lab.remove_host(host)

    # --- the underlay ----------------------------------------------------------------------------

    def drop(self, matches: Sequence[str]) -> Callable[[], None]:
        """Drop these in the underlay, besides what else is dropped; the result ends it."""
        mark = object()
        self._dropped[mark] = matches
        self._write_drops()
        return partial(self._undrop, mark)

    def _undrop(self, mark: object) -> None:
        self._dropped.pop(mark, None)
        self._write_drops()

    def _write_drops(self) -> None:
        self.lab.underlay.drop([match for matches in self._dropped.values() for match in matches])

    def count_astray(self, name: str) -> None:
        """Remember the counter of a host before its rules are loaded anew."""
        self.notes.astray[name] = self.notes.astray.get(name, 0) + astray(self.host(name))
