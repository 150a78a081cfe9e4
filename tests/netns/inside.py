"""A network namespace that ends with this process, and objects that live in a process inside it.

A process that enters another namespace takes all of pytest along, so the drivers under test are made in a
child that runs `main` below. Calls to them go over its stdin and stdout.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from flanneld_py.daemon.hostwatch import HostWatch, Wanted
from flanneld_py.daemon.identity import Identity
from flanneld_py.daemon.inbox import Inbox
from flanneld_py.drivers.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

T = TypeVar("T")

DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
ROOT = Path(__file__).parents[2]
FEW_FILES = 3
"""As many as are open anyway, yet enough for poll(2), which takes no more than the limit."""


@dataclass(frozen=True)
class Kept:
    """An object in the child."""

    number: int


@dataclass(frozen=True)
class Call:
    """What the child is asked."""

    target: Kept | str
    """An object made before, or a module."""
    attribute: str
    arguments: tuple[Any, ...] = ()
    keep: bool = False
    """Leave the result in the child and answer with its `Kept`."""


@dataclass(frozen=True)
class Answer:
    """What the child answers."""

    value: Any
    raised: bool
    user_seconds: float


class Agent:
    """A child process. `before` is a command that runs the rest of its arguments as a command."""

    def __init__(self, before: Sequence[str] = ()) -> None:
        self._child = subprocess.Popen(
            [*DIE_WITH_US, *before, sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.pid = self._child.pid
        self.user_seconds = 0.0
        """CPU of the last call, without the kernel's."""

    def make(self, kind: type[T], *arguments: object) -> T:
        """An object of this class in the child; what is returned looks like it."""
        kept = self.ask(Call(kind.__module__, kind.__qualname__, arguments, keep=True))
        return cast("T", Remote(self, kept, kind))

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function of a module in the child."""
        given = tuple(a.kept if isinstance(a, Remote) else a for a in arguments)
        return cast("T", self.ask(Call(function.__module__, function.__qualname__, given)))

    def ask(self, call: Call) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        pickle.dump(call, self._child.stdin)
        self._child.stdin.flush()
        answer: Answer = pickle.load(self._child.stdout)  # noqa: S301 - from our own child
        self.user_seconds = answer.user_seconds
        if answer.raised:
            raise answer.value
        return answer.value

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()


class Remote:
    """Stands for an object in the child: methods and properties are asked there."""

    def __init__(self, agent: Agent, kept: Kept, kind: type) -> None:
        self._agent, self.kept, self._kind = agent, kept, kind

    def __getattr__(self, name: str) -> Any:
        if isinstance(getattr(self._kind, name), property):
            return self._agent.ask(Call(self.kept, name))

        def method(*arguments: object) -> Any:
            return self._agent.ask(Call(self.kept, name, arguments))

        return method


class Namespace:
    """A network namespace of its own, with loopback up."""

    def __init__(self) -> None:
        self._end = ExitStack()
        holder = subprocess.Popen([*DIE_WITH_US, "unshare", "--net", "sleep", "infinity"])
        self._end.callback(holder.wait)
        self._end.callback(holder.kill)
        self.path = Path(f"/proc/{holder.pid}/ns/net")
        deadline = time.monotonic() + 10
        while self.path.readlink() == Path("/proc/self/ns/net").readlink():
            assert holder.poll() is None, "unshare failed"
            assert time.monotonic() < deadline, "no namespace after 10 s"
            time.sleep(0.001)
        self.ip("link set lo up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.close()

    def agent(self, *before: str) -> Agent:
        agent = Agent(("nsenter", f"--net={self.path}", *before))
        self._end.callback(agent.close)
        return agent

    def run(self, *command: str, text: str = "") -> str:
        """A command's output, given `text`; one that fails is an error."""
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """A command that goes on, its input and output in pipes."""
        return subprocess.Popen(
            self.entered(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def entered(self, *command: str) -> list[str]:
        """The command line that runs a command in here."""
        return [*DIE_WITH_US, "nsenter", f"--net={self.path}", *command]

    def ip(self, *lines: str) -> None:
        """Carry out `ip …` for each line. Not by -batch: there iproute2 6.1 mixes up protocol names."""
        for line in lines:
            self.run("ip", *line.split())

    def show(self, *what: str) -> Any:
        """What `ip -j -d …` or `bridge -j -d …` shows."""
        tool, *rest = what if what[0] == "bridge" else ("ip", *what)
        return json.loads(self.run(tool, "-j", "-d", *rest) or "[]")


# --- the child ------------------------------------------------------------------------------------


def after(seconds: float, monitor: Any, action: str) -> tuple[Any, float]:
    """Wait with a monitor while another thread interrupts or closes it; the result and how long it took."""
    begun = time.monotonic()
    timer = threading.Timer(seconds, getattr(monitor, action))
    timer.start()
    heard = monitor.wait(60)
    timer.join()
    return heard, time.monotonic() - begun


class Watched:
    """A HostWatch at work in a thread, whose process can be kept from opening sockets."""

    def __init__(self, prefix: str, iface: str) -> None:
        self._inbox = Inbox()
        self._watch = HostWatch(Monitor(), Wanted(Identity("node"), prefix, iface=(iface,)), self._inbox)
        self._watch.read()
        threading.Thread(target=self._watch.run, daemon=True).start()

    def problem(self) -> str:
        found = self._inbox.levels.host_problem
        return found.reason if found else ""

    def mtu(self) -> int:
        host = self._inbox.levels.host
        return host.external.mtu if host else 0

    def starve(self) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, most))

    def feed(self) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def loaded(module: str) -> bool:
    return module in sys.modules


def listing(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def carry_out(call: Call, objects: list[Any]) -> Any:
    target = objects[call.target.number] if isinstance(call.target, Kept) else import_module(call.target)
    value = getattr(target, call.attribute)
    if callable(value):
        value = value(*(objects[a.number] if isinstance(a, Kept) else a for a in call.arguments))
    if call.keep:
        objects.append(value)
        return Kept(len(objects) - 1)
    return value


def main() -> None:
    """Answer questions until there are no more."""
    # What is printed by mistake must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    objects: list[Any] = []
    while True:
        try:
            call: Call = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own parent
        except EOFError:
            return
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        try:
            value, raised = carry_out(call, objects), False
        except Exception as error:  # noqa: BLE001 - the parent raises it
            value, raised = error, True
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - begun
        pickle.dump(Answer(value, raised, used), answers)
        answers.flush()
