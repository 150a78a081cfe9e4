"""flanneld-py that dies of SIGKILL at a step of writing what it keeps of the registry.

    python -m tests.netns.die_keeping synced --etcd-endpoints=…

Steps: before, opened (some of it is written), synced, renamed, folder synced.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from flanneld_py.cli.daemon import main as run_daemon
from flanneld_py.daemon import registrymemory
from flanneld_py.drivers.files import write_atomically


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    step, *arguments = sys.argv[1:]
    fsync, replace = os.fsync, Path.replace

    def dying(path: Path, text: str, mode: int = 0o644) -> None:
        """Only one thread writes here, and it does not come back; the others go on as they were."""
        syncs: list[int] = []
        here = threading.get_ident()

        def sync(descriptor: int) -> None:
            if threading.get_ident() != here:
                fsync(descriptor)
                return
            if step == "opened":
                os.ftruncate(descriptor, len(text) // 2)
                die()
            fsync(descriptor)
            syncs.append(descriptor)
            if step == "synced" or len(syncs) == 2:
                die()

        def rename(self: Path, target: Any) -> Path:
            result = replace(self, target)
            if step == "renamed" and threading.get_ident() == here:
                die()
            return result

        if step == "before":
            die()
        os.fsync, Path.replace = sync, rename  # type: ignore[assignment,method-assign]
        write_atomically(path, text, mode)

    vars(registrymemory)["write_atomically"] = dying
    run_daemon(arguments)


if __name__ == "__main__":
    main()
