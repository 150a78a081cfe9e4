"""flanneld-py or flannelctl that dies of SIGKILL right after its n-th write (0: right before its first one).

    python -m tests.netns.die_at 3 daemon --etcd-endpoints=…
    python -m tests.netns.die_at 3 ctl --etcd-endpoints=… cleanup

A write is one send of a driver to the kernel, one batch of files, each fsync on the way to it, or a file or
directory that cleanup removes. Most batches are one send; a device is made by two. Each write is named on
standard error: `wrote: set routes`, `wrote: set fdb, neighs, nexthops`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flanneld_py.cli.ctl import commands as ctl
from flanneld_py.cli.daemon import main as run_daemon
from flanneld_py.drivers.blackholes import Blackholes
from flanneld_py.drivers.files import HostFiles
from flanneld_py.drivers.kernel import KernelLinks
from flanneld_py.drivers.netlink import NetlinkSocket
from flanneld_py.drivers.offloads import Offloads
from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from flanneld_py.udp.tunnel import Tunnel
from flanneld_py.udp.tuns import Tuns

T = TypeVar("T")


class Countdown(threading.local):
    """Writes still allowed, and the batch under way; only the thread that carries out plans has batches."""

    def __init__(self, writes: int) -> None:
        self.left = writes
        self.batch = ""

    def write(self, name: str, act: Callable[[], T]) -> T:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = act()
        os.write(2, f"wrote: {name}\n".encode())
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def count_batches(driver: Any, countdown: Countdown, *, whole: bool) -> None:
    """`whole`: the batch itself is the write, not what it sends."""
    apply = driver.apply

    def counted(self: Any, ops: Any) -> Any:
        countdown.batch = f"{ops[0].verb} {', '.join(dict.fromkeys(op.table for op in ops))}"
        try:
            return countdown.write(countdown.batch, lambda: apply(self, ops)) if whole else apply(self, ops)
        finally:
            countdown.batch = ""

    driver.apply = counted


def count_calls(owner: Any, name: str, countdown: Countdown, label: Callable[[Any], str]) -> None:
    """Count a method's calls; those it labels with nothing are none."""
    method = getattr(owner, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = label(self)
        if not named:
            return method(self, *args, **kwargs)
        return countdown.write(named, lambda: method(self, *args, **kwargs))

    setattr(owner, name, counted)


def main() -> None:
    writes, program, *arguments = sys.argv[1:]
    countdown = Countdown(int(writes))
    count_batches(RtnetlinkTables, countdown, whole=False)
    count_batches(KernelLinks, countdown, whole=False)
    count_batches(Blackholes, countdown, whole=False)
    count_batches(Tunnel, countdown, whole=True)
    count_calls(Tuns, "keep", countdown, lambda _: countdown.batch)
    count_batches(Offloads, countdown, whole=True)
    count_batches(HostFiles, countdown, whole=True)
    count_calls(NetlinkSocket, "transact", countdown, lambda _: countdown.batch)
    count_calls(os, "fsync", countdown, lambda _: "fsync" if countdown.batch else "")
    if program == "daemon":
        run_daemon(arguments)
        return
    # Outside a batch: what cleanup itself removes.
    count_calls(Path, "unlink", countdown, lambda path: "" if countdown.batch else f"remove {path.name}")
    count_calls(Path, "rmdir", countdown, lambda path: f"remove {path.name}/")
    sys.exit(ctl.run(arguments))


if __name__ == "__main__":
    main()
