"""flanneld-py whose threads hang on demand: those named by a file `hang` beside subnet.env, at the next step.

They beat more often than usual and have less time for it, so that nobody waits for a minute.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from flanneld_py.cli.daemon import main
from flanneld_py.daemon import control, filterwatch, heartbeats, hostwatch, inbox, publisher
from flanneld_py.daemon.leasekeeper import LeaseKeeper
from flanneld_py.daemon.reconciler import Reconciler

BEAT_EVERY, LIMIT = 0.1, 1.0
QUIET = "registry-watch"
"""It beats when etcd sends something, and keeps its limit."""
STEPS = {
    "main": (control.Control, "check"),  # after SIGHUP
    "lease-keeper": (LeaseKeeper, "_step"),
    "host-watch": (hostwatch.HostWatch, "_take"),
    "filter-watch": (filterwatch.FilterWatch, "_look"),
    "reconciler": (Reconciler, "_pass"),
    "publisher": (publisher.Publisher, "_is_outdated"),
    "control": (control.Control, "_in_place"),
}
"""Thread → what only it calls, again and again."""


def _hanging(step: Any, thread: str, file: Path) -> Any:
    def hang(*args: Any) -> Any:
        if file.exists() and thread in file.read_text().split():
            threading.Event().wait()
        return step(*args)

    return hang


if __name__ == "__main__":
    for module in (inbox, hostwatch, filterwatch):
        module.BEAT_EVERY = BEAT_EVERY  # type: ignore[attr-defined]
    control.CHECK = publisher.LOOK = BEAT_EVERY
    filterwatch.LEGACY_EVERY = filterwatch.NO_LEGACY_EVERY = BEAT_EVERY
    heartbeats.LIMITS.update({thread: LIMIT for thread in heartbeats.LIMITS if thread != QUIET})
    (subnet_file,) = (flag.partition("=")[2] for flag in sys.argv if flag.startswith("--subnet-file="))
    for thread, (owner, name) in STEPS.items():
        setattr(owner, name, _hanging(getattr(owner, name), thread, Path(subnet_file).with_name("hang")))
    main()
