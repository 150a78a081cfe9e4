"""The daemon put together: what is made in which order, the threads, and the end."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog
from msgspec.structs import replace

from flanneld_py import __version__
from flanneld_py.addresses import Subnets
from flanneld_py.core.hostfiles import socket_path, status_path
from flanneld_py.core.registrycache import Cached
from flanneld_py.core.rules import names_of
from flanneld_py.daemon.configwatch import ConfigWatch
from flanneld_py.daemon.control import Control
from flanneld_py.daemon.dataplane import DataPlaneWatch, take_over
from flanneld_py.daemon.endpoints import http_servers
from flanneld_py.daemon.execute import Executor
from flanneld_py.daemon.failedstart import FIX, failure_told
from flanneld_py.daemon.fdstore import FdStore
from flanneld_py.daemon.filterwatch import FilterWatch
from flanneld_py.daemon.firstchoice import Before
from flanneld_py.daemon.forwarding import ForwardingWatch
from flanneld_py.daemon.heartbeats import Heartbeats
from flanneld_py.daemon.hostwatch import HostWatch, Wanted, follow
from flanneld_py.daemon.identity import Identity, identity_of
from flanneld_py.daemon.inbox import Inbox, Problem, boottime
from flanneld_py.daemon.lasttime import LastTime, last_registry, last_time, old_text
from flanneld_py.daemon.leasefile import LeaseFile
from flanneld_py.daemon.leasekeeper import LeaseKeeper
from flanneld_py.daemon.lock import Locks
from flanneld_py.daemon.neighbourlimit import NeighbourLimit
from flanneld_py.daemon.notify import Notifier, Watchdog
from flanneld_py.daemon.options import Options
from flanneld_py.daemon.overlap import OverlapWatch, find_overlap
from flanneld_py.daemon.publisher import Publisher
from flanneld_py.daemon.reconciler import Reconciler
from flanneld_py.daemon.registrymemory import RegistryMemory
from flanneld_py.daemon.registrywatch import RegistryWatch
from flanneld_py.daemon.status import Process, compose, compose_peers, what_stays
from flanneld_py.daemon.subnetfile import SubnetFileWatch
from flanneld_py.daemon.target import Settings, Target
from flanneld_py.drivers.blackholes import Blackholes
from flanneld_py.drivers.etcd import EtcdRegistry
from flanneld_py.drivers.files import HostFiles
from flanneld_py.drivers.filtertools import Tools, find_tools
from flanneld_py.drivers.kernel import KernelLinks
from flanneld_py.drivers.monitor import Monitor
from flanneld_py.drivers.offloads import Offloads
from flanneld_py.drivers.packetrules import PacketRules
from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from flanneld_py.errors import FlanneldError, HostError
from flanneld_py.udp.kept import Kept
from flanneld_py.udp.tunnel import Tunnel
from flanneld_py.udp.tuns import Tuns

STOP_WITHIN = 4.0
"""Seconds for the threads to end after SIGTERM; a call to a hanging etcd is then abandoned."""
CAP_NET_ADMIN = 12
"""linux/capability.h."""
LAST_RESORT = 4.5
"""Seconds after SIGTERM when the process ends whatever it does: a disk or a terminal may hang too."""
NOT_CURED_BY_WAITING = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
}
"""Why a directory cannot be used; a full disk, for one, may have room again."""
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
THREAD_DIED = signal.SIGUSR1
SHOW_LIFE = signal.SIGUSR2
"""Asks the main thread to beat, which else waits for signals that never come."""
SIGNALS = {*STOP_SIGNALS, signal.SIGHUP, THREAD_DIED, SHOW_LIFE}


def settings_of(options: Options, last: LastTime, tools: Tools) -> Settings:
    """What the reconciler is told once and for all."""
    prefix = options.etcd.prefix
    return Settings(
        prefix,
        str(options.subnet_file),
        blackhole=options.blackhole,
        wish=replace(options.wish, fully_random=options.wish.fully_random and tools.random_fully),
        tools=tools,
        known_networks=last.networks,
        wipe_grace=options.wipe_grace,
    )


def wanted_of(options: Options, last: LastTime, identity: Identity) -> Wanted:
    """What the choice of the external interface goes by."""
    return Wanted(
        identity,
        options.etcd.prefix,
        iface=options.iface,
        iface_regex=options.iface_regex,
        iface_can_reach=options.iface_can_reach,
        public_ip=options.public_ip,
        public_ipv6=options.public_ipv6,
        endpoints=options.etcd.endpoints,
        before=Before(bool(last.subnets), last.run.mac),
    )


def require_net_admin() -> None:
    """Raise HostError without CAP_NET_ADMIN, which every change to the kernel needs."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff" and not int(value, 16) >> CAP_NET_ADMIN & 1:
            raise HostError(
                "needs CAP_NET_ADMIN; run it as root, or grant the capability (AmbientCapabilities= of the "
                "service)"
            )


def require_directory(subnet_file: Path) -> None:
    """Raise HostError where the subnet file's directory cannot be made or written."""
    directory = subnet_file.parent
    number = 0
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        number = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno or 0
    else:
        number = 0 if os.access(directory, os.W_OK | os.X_OK) else errno.EACCES
    if number in NOT_CURED_BY_WAITING:
        raise HostError(
            f"--subnet-file {subnet_file}: {directory}: {os.strerror(number)}; expected a directory that can "
            f"be written"
        )


class Daemon:
    """Owns everything; `run` is the process's life."""

    def __init__(self, options: Options, kept: Kept) -> None:
        """Make all parts. Nothing is changed on the host yet but locks.

        Raises:
            HostError, UsageError: this host or the command line makes a start pointless.
            OSError: this process has reached a limit.
        """
        # Blocked before any thread is started, so that only the main thread in `run` takes them.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        require_net_admin()
        require_directory(options.subnet_file)
        self._options = options
        self._kept = kept
        prefix = options.etcd.prefix
        self._log = structlog.get_logger().bind(part="main")
        self._locks = Locks(prefix, options.state_dir, options.subnet_file)
        with failure_told(options):
            self._make_parts(options, prefix)

    def _make_parts(self, options: Options, prefix: str) -> None:
        last = last_time(options)
        identity = identity_of(options.node_id, options.state_dir, last.mac_seed)
        cached = last_registry(options, identity.node_id)
        self._heartbeats = Heartbeats()
        self._inbox = Inbox(self._heartbeats)
        self._notifier = Notifier()
        self._watchdog = Watchdog(self._notifier, self._heartbeats)
        self._registry = EtcdRegistry(options.etcd, partial(self._inbox.counts.took, "registry_request"))
        settings, names = settings_of(options, last, find_tools()), names_of(prefix)
        if settings.tools == Tools():
            self._log.warning(
                "no_filter_tool",
                reason="neither nft nor iptables is installed, so no packet-filter rules are made; "
                "install nftables or iptables, then restart",
            )
        self._filterwatch = FilterWatch(self._inbox, names, settings.wish)
        tuns = Tuns()
        self._rules = PacketRules(names, settings.tools, self._filterwatch.places)
        tables, links, blackholes = RtnetlinkTables(prefix), KernelLinks(prefix, tuns), Blackholes(prefix)
        tunnel = self._make_tunnel(options, tuns, links)
        self._monitor = Monitor(ignore_ports={*tables.port_ids, *links.port_ids, *blackholes.port_ids})
        self._reconciler = Reconciler(
            Executor((links, tunnel, tables, blackholes, Offloads(), self._rules, HostFiles())),
            settings,
            self._inbox,
            self._follow,
            cached.last_peers if cached else None,
        )
        wanted = wanted_of(options, last, identity)
        self._configwatch = ConfigWatch(prefix, self._inbox, self._registry.config_lines)
        self._registrywatch = RegistryWatch(self._registry, self._configwatch, self._inbox)
        self._hostwatch = HostWatch(self._monitor, wanted, self._inbox, self._registrywatch.reconnect)
        self._set_alarms()
        self._filterwatch.begin()
        self._threads: list[threading.Thread] = []
        self._process = Process(
            os.getpid(), prefix, identity.node_id, self._hanging, lambda: self._dataplane.counters
        )
        self._looks = (
            SubnetFileWatch(options.subnet_file, self._inbox).look,
            OverlapWatch(self._inbox, last.networks).look,
            ForwardingWatch(self._inbox).look,
            NeighbourLimit(self._inbox).look,
        )
        self._inbox.offer(inherited=last.subnets)
        self._servers = http_servers(options, self._inbox, self._process, self._look)
        self._hostwatch.begin()
        identity.changed = self._monitor.interrupt
        saved = replace(last.saved, node_id=last.saved.node_id or identity.node_id)
        self._leasefile = LeaseFile(options.state_file, saved, last.networks, lambda: self._is_clean(last))
        self._leasekeeper = self._make_leasekeeper(options, identity, last)
        self._memory = self._make_memory(options, cached, last.saved.subnets)
        self._publisher = self._make_publisher(options)
        self._control = self._make_control(options)
        self._failed = False
        self.ended_by: FlanneldError | None = None
        """Why it ended by itself, though it is no defect of ours."""
        self._asked_to_stop = threading.Event()

    def _is_clean(self, last: LastTime) -> bool:
        """Whether nothing is left of earlier Networks, neither rows of ours nor a bridge."""
        levels = self._inbox.levels
        return levels.report.in_sync and find_overlap(levels, last.networks) is None

    def _set_alarms(self) -> None:
        """For the threads that wait on something else than the inbox."""
        for level in ("network", "registry"):
            self._inbox.alarm(level, self._monitor.interrupt)
        for level in ("host", "lease", "report"):
            self._inbox.alarm(level, self._filterwatch.interrupt)
        self._inbox.alarm("host", self._configwatch.review)

    def _make_memory(self, options: Options, cached: Cached | None, leased: Subnets) -> RegistryMemory:
        """What stands in the place of etcd at a start without it."""
        watch, config = self._registrywatch, self._configwatch
        memory = RegistryMemory(
            self._inbox,
            options.registry_file,
            cached,
            watch.recall,
            lambda: config.in_force()["in_force"],
            leased,
        )
        watch.may_recall = lambda: memory.may_recall
        watch.last_run = cached.others if cached else None
        return memory

    def _make_publisher(self, options: Options) -> Publisher:
        status_file = Path(status_path(str(options.subnet_file)))
        return Publisher(self._inbox, self._process, status_file, self._notifier, self._look)

    def _look(self) -> None:
        """At what no event tells of."""
        for look in self._looks:
            look()
        self._leasefile.write_owed()

    def _make_tunnel(self, options: Options, tuns: Tuns, links: KernelLinks) -> Tunnel:
        """It forwards at once where an earlier process left something to forward with."""
        tunnel = Tunnel(options.etcd.prefix, tuns, FdStore())
        self._dataplane = DataPlaneWatch(self._inbox, tunnel.look, options.tunnel_file)
        tunnel.changed = self._dataplane.remember
        take_over(tunnel, self._kept, lambda: old_text(options.tunnel_file), links.marked)
        return tunnel

    def _follow(self, target: Target) -> None:
        self._leasefile.remember(target.networks)
        follow(self._monitor, target)
        self._filterwatch.follow(target)

    def _make_leasekeeper(self, options: Options, identity: Identity, last: LastTime) -> LeaseKeeper:
        return LeaseKeeper(
            self._registry,
            self._inbox,
            identity,
            last.run,
            self._leasefile,
            options.lease,
            self._registrywatch.distrust,
        )

    def _make_control(self, options: Options) -> Control:
        return Control(
            Path(socket_path(str(options.subnet_file))),
            {
                "status": lambda: compose(self._inbox.levels, self._process),
                "peers": lambda: compose_peers(self._inbox.levels, self._process),
                "plan": self._reconciler.ask_plan,
                "config": self._configwatch.in_force,
                "apply-config": self._configwatch.apply,
            },
            self._inbox.beat,
        )

    def _hanging(self) -> list[str]:
        """The threads that do not turn: ended, or late."""
        ended = (thread.name for thread in self._threads if thread.ident and not thread.is_alive())
        return sorted({*ended, *self._heartbeats.late(time.monotonic())})

    def start(self) -> None:
        """Start the threads.

        Raises:
            RuntimeError, MemoryError: a limit allows no more threads.
        """
        if signal.sigpending() & STOP_SIGNALS:
            return  # `run` then ends at once
        self._log.info(
            "start",
            version=__version__,
            node=self._process.node_id,
            prefix=self._process.prefix,
            etcd=list(self._options.etcd.endpoints),
        )
        self._threads = [
            self._thread("registry-watch", self._registrywatch.run),
            self._thread("lease-keeper", self._leasekeeper.run),
            self._thread("host-watch", self._hostwatch.run),
            self._thread("filter-watch", self._filterwatch.run),
            self._thread("reconciler", self._reconciler.run),
            self._thread("data-plane", self._dataplane.run),
            self._thread("publisher", self._publisher.run),
            self._thread("registry-memory", self._memory.run),
            self._thread("control", self._control.run),
        ]
        self._threads += [self._thread(name, server.run) for name, server in self._servers.items()]
        # Made now: at the end there may be no thread to be had.
        self._thread("watchdog", partial(self._watch_over, threading.get_ident())).start()
        self._heartbeats.beat("main")
        for thread in self._threads:
            self._heartbeats.beat(thread.name)  # one that hangs in its very first step is late as well
            thread.start()

    def run(self) -> int:
        """Work until a signal; the answer is the exit code."""
        if not self._threads:
            self._control.stop()
            return os.EX_OK
        number = self._wait_for_end()
        self._asked_to_stop.set()
        try:
            self._stop(number)
        except Exception:  # noqa: BLE001 - the process must end all the same
            self._failed = True
            self._log.exception("defect", thread="main")
        return self._code

    @property
    def _code(self) -> int:
        if self._failed:
            return os.EX_SOFTWARE
        return self.ended_by.exit_code if self.ended_by else os.EX_OK

    def _watch_over(self, main: int) -> None:
        """Feed the watchdog until the end is due; then see to it that it comes. `main`: its number."""
        self._watchdog.feed(time.monotonic())
        while not self._asked_to_stop.wait(self._watchdog.interval):
            signal.pthread_kill(main, SHOW_LIFE)
            self._watchdog.feed(time.monotonic())
        time.sleep(LAST_RESORT)
        os._exit(self._code)

    def _wait_for_end(self) -> int:
        while True:
            number = signal.sigwait(SIGNALS)
            if number == SHOW_LIFE:
                self._heartbeats.beat("main")
                continue
            if number != signal.SIGHUP:
                return number
            self._log.info("resync", reason="SIGHUP")
            self._inbox.kernel_changed()
            self._control.check()
            self._notifier.send_reloaded(time.monotonic())

    def _stop(self, number: int) -> None:
        if number == THREAD_DIED:
            self._log.info("stop", reason=str(self.ended_by or "a defect of ours"))
        else:
            self._log.info("stop", signal=signal.Signals(number).name)
        network = self._inbox.levels.network_in_force
        stays = what_stays(network.backend.type if network else None)
        self._notifier.send(STOPPING="1", STATUS=f"stopping; {stays}")
        deadline = boottime() + STOP_WITHIN
        self._inbox.stop()
        self._registrywatch.stop()
        # Ends calls to an etcd that hangs; in a thread of its own, as it may hang itself.
        with suppress(RuntimeError):  # no thread to be had: then the calls are abandoned
            self._thread("registry-close", self._registry.close).start()
        self._monitor.interrupt()
        self._filterwatch.interrupt()
        self._rules.interrupt()
        self._control.stop()
        for server in self._servers.values():
            server.stop()
        for thread in self._threads:
            thread.join(max(0.0, deadline - boottime()))
        late = [thread.name for thread in self._threads if thread.is_alive()]
        if late:
            self._log.warning("abandoned", threads=late)
        ended = self._ended if number == THREAD_DIED else None
        self._publisher.publish(compose(self._inbox.levels, self._process, stopped=True, ended=ended))

    @property
    def _ended(self) -> Problem:
        """Why it ends by itself."""
        if self.ended_by is None:
            return Problem("ended", "a defect of ours; the log has it", "start flanneld-py again; report it")
        return Problem("ended", str(self.ended_by), FIX)

    def _thread(self, name: str, body: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                body()
            except FlanneldError as error:
                # What nobody in the thread catches is meant to end the process.
                self._log.error("end", thread=name, reason=str(error))
                self.ended_by = error
                os.kill(os.getpid(), THREAD_DIED)
            except Exception:  # noqa: BLE001 - whatever it is, the process must not go on without this thread
                # A defect of ours: say it once and end the process, a manager will start it afresh.
                self._failed = True
                try:
                    self._log.exception("defect", thread=name)
                finally:
                    os.kill(os.getpid(), THREAD_DIED)

        return threading.Thread(target=guarded, name=name, daemon=True)
