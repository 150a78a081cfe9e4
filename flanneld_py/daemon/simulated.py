"""Hosts that do not exist: each has a daemon's registry and lease code, threads and watch, and no kernel."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.statefile import SavedState, parse_state
from flanneld_py.daemon.configwatch import ConfigWatch
from flanneld_py.daemon.identity import Identity
from flanneld_py.daemon.inbox import Inbox, Report, boottime
from flanneld_py.daemon.leasefile import LeaseFile
from flanneld_py.daemon.leaseground import LastRun
from flanneld_py.daemon.leasekeeper import LeaseKeeper
from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.daemon.registrywatch import RegistryWatch
from flanneld_py.drivers.etcd import ATTEMPT_SECONDS, EtcdRegistry, EtcdSettings
from flanneld_py.errors import FlanneldError
from flanneld_py.model import External, Host

UNDERLAY = IPv4Network("198.18.0.0/15")
"""Of their addresses (RFC 2544): real hosts are not to be met."""
LOOK = 0.002


class SimulatedNode:
    """One of them. It starts and stops as often as one likes, and finds its lease again by its state file."""

    def __init__(self, settings: EtcdSettings, number: int, directory: Path) -> None:
        """`number`: from 0; each has another one. Nothing is sent yet."""
        self._settings = settings
        self._number = number
        self._path = directory / f"state-{number}.json"
        self.requests: Counter[str] = Counter()
        """By etcd's name of the call, of all its runs."""
        self._leases: set[int] = set()
        """Every etcd lease that it was granted."""
        self._threads: list[threading.Thread] = []
        self._inbox = Inbox()
        self._error: Exception | None = None

    def start(self) -> None:
        """A new run, as of a process that has just been started."""
        address = UNDERLAY[self._number + 1]
        node_id = f"{self._number:032x}"
        inbox = self._inbox = Inbox()
        self._registry = _Registry(self._settings, self._count, self._leases)
        prefix = self._settings.prefix
        config = ConfigWatch(prefix, inbox, self._registry.config_lines)
        self._watch = RegistryWatch(self._registry, config, inbox)
        saved = parse_state(read_regular(self._path) or "") or SavedState(prefix, node_id)
        keeper = LeaseKeeper(
            self._registry,
            inbox,
            Identity(node_id, fixed=True),
            LastRun.of(saved),
            LeaseFile(self._path, saved),
            LeasePolicy(),
            self._watch.distrust,
        )
        # There is no kernel to be set up, for which a daemon's lease-keeper waits.
        inbox.offer(host=_host(node_id, prefix, address), report=Report(passes=1))
        self._threads = [self._thread(self._watch.run), self._thread(keeper.run)]
        for thread in self._threads:
            thread.start()

    @property
    def settled(self) -> bool:
        """Whether it holds its lease, and follows the registry.

        Raises:
            FlanneldError: it cannot go on.
        """
        if isinstance(self._error, FlanneldError):
            raise self._error
        if self._error is not None:
            raise RuntimeError("a simulated node has failed") from self._error
        levels = self._inbox.levels
        return levels.lease.state == "held" and levels.registry.state == "in sync"

    @property
    def trouble(self) -> str:
        """Why it is not settled, if it knows."""
        levels = self._inbox.levels
        problem = levels.lease.problem or levels.config_problem
        return problem.reason if problem else f"registry {levels.registry.state}"

    @property
    def events(self) -> int:
        """Puts and deletes that its watch has brought in this run."""
        return sum(self._inbox.counts.counted("events").values())

    def end(self) -> None:
        """Have this run end soon, if there is one."""
        if self._threads:
            self._inbox.stop()
            self._watch.stop()

    def stop(self) -> None:
        """End this run, if there is one, also one that has only half begun; the lease stays."""
        self.end()
        if not self._threads:
            return
        started = [thread for thread in self._threads if thread.is_alive()]
        # The keeper is to learn of a lease that it is being granted.
        if self._threads[-1] in started:
            self._threads[-1].join(ATTEMPT_SECONDS)
        self._registry.close()
        for thread in started:
            thread.join(10)
        self._threads = []

    def release(self, registry: EtcdRegistry) -> None:
        """Give its etcd leases back, and with them the record."""
        for lease in tuple(self._leases):
            registry.revoke(lease)
            self._leases.remove(lease)

    def _count(self, _seconds: float, call: str) -> None:
        self.requests[call] += 1

    def _thread(self, body: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                body()
            except Exception as error:  # noqa: BLE001 - told by `settled`, which somebody waits for
                self._error = error

        return threading.Thread(target=guarded, daemon=True)


class _Registry(EtcdRegistry):
    """Notes the leases that it is granted."""

    def __init__(
        self, settings: EtcdSettings, timed: Callable[[float, str], object], leases: set[int]
    ) -> None:
        super().__init__(settings, timed)
        self._leases = leases

    def grant(self, ttl: int) -> int:
        lease = super().grant(ttl)
        self._leases.add(lease)
        return lease


def settle(
    nodes: Sequence[SimulatedNode], seconds: float, settled: Callable[[], None] = lambda: None
) -> None:
    """Wait until all of them are settled; `settled` is called for each.

    Raises:
        FlanneldError: one cannot go on, or it took longer.
    """
    until = boottime() + seconds
    for node in nodes:
        while not node.settled:
            if boottime() >= until:
                raise FlanneldError(f"not all nodes held their lease after {seconds:g} s: {node.trouble}")
            time.sleep(LOOK)
        settled()


def _host(node_id: str, prefix: str, address: IPv4Address) -> Host:
    number = int(address) - int(UNDERLAY.network_address)
    external = External(
        "eth0",
        1500,
        PerFamily(address),
        PerFamily(address),
        f"02:00:06:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
    )
    host = Host(node_id, prefix, external, frozenset([address]))
    return replace(host, devices={address: "eth0"})
