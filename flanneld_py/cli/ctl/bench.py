"""flannelctl bench: what a fleet costs etcd, tried with the daemon's own code and no hosts."""

from __future__ import annotations

import logging
import re
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
from msgspec import Struct
from msgspec.structs import asdict

from flanneld_py.cli.ctl.progress import PATIENCE
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.text import echo_json, table
from flanneld_py.errors import FlanneldError, RegistryError, Unreachable

if TYPE_CHECKING:
    from flanneld_py.daemon.simulated import SimulatedNode
    from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings

AT_ONCE = 50
"""Nodes that start at the same time."""
SETTLED_WITHIN = 120.0
"""Seconds for these."""
GIVE_UP_AFTER = 3
"""Leases that could not be given back: each may take a quarter of a minute."""
WATCHES = 200
CONFIG = '{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}'
MOST_NODES = 60_000
"""Subnets of that Network, less some room to find a free one."""
COLUMNS = """\
writes: revisions by which etcd went on. events: puts and deletes that the watches of those that stay brought.
kB sent, requests: by etcd's own count, divided by the nodes; others who use this etcd count as well. Where it
does not tell (https), requests are counted by the nodes; the watch is none of them."""
_RECEIVED = re.compile(
    r'^grpc_server_msg_received_total\{grpc_method="(\w+)",grpc_service="[\w.]*\.(\w+)".*\} (\S+)$',
    re.MULTILINE,
)
_SENT = re.compile(r"^etcd_network_client_grpc_sent_bytes_total (\S+)$", re.MULTILINE)


class Step(Struct, frozen=True):
    """What happened to etcd while the nodes did one thing."""

    name: str
    nodes: int
    seconds: float
    calls: dict[str, int]
    """By name, as the nodes made them; an open watch is none."""
    writes: int
    """Revisions by which etcd went on."""
    events: int
    """That the watches of the others brought."""
    received: dict[str, int] | None
    """Messages that etcd says it has received; None: it does not tell us."""
    sent: int | None
    """Bytes that it has sent."""


@click.group()
def bench() -> None:
    """Try what many hosts would cost etcd."""


@bench.command()
@click.option(
    "--nodes", type=click.IntRange(1, MOST_NODES), default=100, show_default=True, help="Simulated hosts."
)
@click.option(
    "--watches",
    type=click.IntRange(0, MOST_NODES),
    default=WATCHES,
    show_default=True,
    help="Of these, hosts that go on watching; each has all records in memory. The others leave once they "
    "have their lease.",
)
@click.option("--json", "as_json", is_flag=True, help="A list of steps.")
@with_settings
def registry(settings: Settings, nodes: int, watches: int, as_json: bool) -> int:
    """Drive the registry and lease code of many daemons against etcd, and print what etcd carries.

    It is the code of the daemon, with a connection, a watch and threads for each node, below a prefix of its
    own, <prefix>-flanneld-py-bench-…, which is deleted at the end. The nodes join, and then start again with
    nothing changed. Do not try it on an etcd that others need just now.

    Ctrl-C and SIGTERM end it, and leave nothing in etcd. What a run that was killed has left there goes,
    while no other run is under way, with the line below; its etcd leases end by themselves within a day.

    \b
        etcdctl del --prefix <prefix>-flanneld-py-bench-
    """  # noqa: D301 - click's mark for a line that stays as it is
    _say_nothing()
    etcd = settings.etcd()
    etcd = replace(etcd, prefix=f"{settings.prefix}-flanneld-py-bench-{secrets.token_hex(4)}")
    _import_all()
    with _signals() as signals:
        steps = _tried(etcd, nodes, watches, signals)
    if signals.came:
        click.echo("flannelctl: interrupted; nothing is left in etcd", err=True)
        raise click.Abort
    if as_json:
        echo_json([asdict(step) for step in steps])
    else:
        click.echo(f"{_shown(steps)}\n\n{COLUMNS}")
    return 0


def _import_all() -> None:
    """What is imported below as well: a signal in the midst of an import can be lost there."""
    import urllib.request  # noqa: F401, PLC0415

    import flanneld_py.daemon.simulated  # noqa: F401, PLC0415


class _Signals:
    """Which end the work, and never the cleaning up behind it."""

    def __init__(self) -> None:
        self.came = False
        self._may_end = False

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """The handler."""
        self.came = True
        if self._may_end:
            self._may_end = False
            raise KeyboardInterrupt

    @contextmanager
    def may_end(self) -> Iterator[None]:
        """What is done in here is left with KeyboardInterrupt, once."""
        try:
            self._may_end = True
            if self.came:
                raise KeyboardInterrupt
            yield
        finally:
            self._may_end = False


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """One line on a terminal that is written anew with each node, once it takes long enough to wonder."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._done = 0
        self._what = ""
        self._speaks_at = time.monotonic() + PATIENCE if sys.stderr.isatty() else float("inf")
        self._spoke = False

    def begin(self, what: str) -> None:
        self._what, self._done = what, 0

    def one_more(self) -> None:
        self._done += 1
        if time.monotonic() >= self._speaks_at:
            self._spoke = True
            click.echo(f"\r{self._what}: {self._done} of {self._nodes} nodes\x1b[K", nl=False, err=True)

    def clear(self) -> None:
        if self._spoke:
            click.echo("\r\x1b[K", nl=False, err=True)


def _tried(etcd: EtcdSettings, nodes: int, watches: int, signals: _Signals) -> list[Step]:
    """Fewer when a signal came.

    Raises:
        FlanneldError: etcd is not reached, or not all of it could be removed from there.
    """
    from flanneld_py.daemon.simulated import SimulatedNode  # noqa: PLC0415 - with all of the daemon
    from flanneld_py.drivers.etcd import EtcdRegistry  # noqa: PLC0415

    fleet: list[SimulatedNode] = []
    steps: list[Step] = []
    progress = _Progress(nodes)
    scratch = EtcdRegistry(etcd)
    with tempfile.TemporaryDirectory(prefix="flannelctl-bench.", ignore_cleanup_errors=True) as directory:
        try:
            with suppress(KeyboardInterrupt), signals.may_end():
                scratch.put("config", CONFIG)
                fleet += [SimulatedNode(etcd, number, Path(directory)) for number in range(nodes)]
                steps += _steps(fleet, fleet[:watches], scratch, progress)
        finally:
            if fleet or signals.came:
                _clean_up(fleet, scratch, etcd.prefix, progress)
            progress.clear()
            scratch.close()
    return steps


def _clean_up(
    fleet: Sequence[SimulatedNode], scratch: EtcdRegistry, prefix: str, progress: _Progress
) -> None:
    """Stop and release all of them, whatever fails, and delete the prefix.

    Raises:
        FlanneldError: something is left in etcd.
    """
    for node in fleet:
        node.end()
    for node in fleet:
        node.stop()
    progress.begin("cleaning up")
    failed: list[RegistryError] = []
    for node in fleet:
        try:
            node.release(scratch)
        except RegistryError as error:
            failed.append(error)
            if len(failed) >= GIVE_UP_AFTER:
                break
        progress.one_more()
    try:
        for entry in scratch.list().entries:
            scratch.delete(entry.key, entry.mod_revision)
    except RegistryError as error:
        failed.append(error)
    if failed:
        kind = Unreachable if isinstance(failed[-1], Unreachable) else FlanneldError
        raise kind(f"{failed[-1]}; {prefix} may be left in etcd, and etcd leases for a day")


def _say_nothing() -> None:
    """A thousand daemons have much to log."""
    import structlog  # noqa: PLC0415

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def _steps(
    fleet: Sequence[SimulatedNode],
    staying: Sequence[SimulatedNode],
    scratch: EtcdRegistry,
    progress: _Progress,
) -> list[Step]:
    passing = fleet[len(staying) :]

    def visit(nodes: Sequence[SimulatedNode]) -> None:
        for some in _batches(nodes):
            _start(some, progress)
            for node in some:
                node.stop()

    def restart() -> None:
        visit(passing)
        for some in _batches(staying):
            for node in some:
                node.stop()
            _start(some, progress)

    def join() -> None:
        for some in _batches(staying):
            _start(some, progress)
        visit(passing)

    steps = []
    for name, act in (("join", join), ("start again", restart)):
        progress.begin(name)
        steps.append(_step(name, act, fleet, staying, scratch))
    return steps


def _start(nodes: Sequence[SimulatedNode], progress: _Progress) -> None:
    from flanneld_py.daemon.simulated import settle  # noqa: PLC0415

    for node in nodes:
        node.start()
    settle(nodes, SETTLED_WITHIN, progress.one_more)


def _batches(nodes: Sequence[SimulatedNode]) -> Iterator[Sequence[SimulatedNode]]:
    for first in range(0, len(nodes), AT_ONCE):
        yield nodes[first : first + AT_ONCE]


def _step(
    name: str,
    act: Callable[[], None],
    fleet: Sequence[SimulatedNode],
    staying: Sequence[SimulatedNode],
    scratch: EtcdRegistry,
) -> Step:
    calls, revision = _calls(fleet), scratch.list().revision
    received, sent = _told(scratch.endpoint)
    began = time.monotonic()
    act()
    seconds = time.monotonic() - began
    received_now, sent_now = _told(scratch.endpoint)
    return Step(
        name,
        len(fleet),
        seconds,
        dict(_calls(fleet) - calls),
        scratch.list().revision - revision,
        sum(node.events for node in staying),  # of their last run, which began in this step
        None if received is None or received_now is None else dict(received_now - received),
        None if sent is None or sent_now is None else sent_now - sent,
    )


def _calls(fleet: Sequence[SimulatedNode]) -> Counter[str]:
    total: Counter[str] = Counter()
    for node in fleet:
        total += node.requests
    return total


def _told(endpoint: str) -> tuple[Counter[str] | None, int | None]:
    """Messages by method that etcd has received, and bytes that it has sent; None where it does not tell."""
    if not endpoint.startswith("http:"):
        return None, None
    import urllib.request  # noqa: PLC0415 - 30 ms, which every other command would wait for

    try:
        with urllib.request.urlopen(f"{endpoint}/metrics", timeout=5) as answer:  # noqa: S310 - http only
            text = answer.read().decode()
    except (OSError, ValueError):
        return None, None
    received = Counter(
        {f"{service}/{method}": int(float(n)) for method, service, n in _RECEIVED.findall(text)}
    )
    sent = _SENT.search(text)
    return received, int(float(sent[1])) if sent else None


def _shown(steps: Sequence[Step]) -> str:
    rows = []
    for step in steps:
        counted = step.received if step.received is not None else step.calls
        each = ", ".join(f"{name} {number / step.nodes:.3g}" for name, number in sorted(counted.items()))
        sent = "" if step.sent is None else f"{step.sent / step.nodes / 1000:.1f}"
        rows.append(
            [
                step.name,
                str(step.nodes),
                f"{step.seconds:.1f}",
                str(step.writes),
                str(step.events),
                sent,
                each,
            ]
        )
    return table(rows, ["step", "nodes", "s", "writes", "events", "kB sent a node", "requests a node"])
