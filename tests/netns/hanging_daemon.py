"""flanneld-py whose reconciler hangs at its next pass once a file `hang` lies beside subnet.env.

Its threads beat more often and have less time for it, so that nobody waits for a minute.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from flanneld_py.cli.daemon import main
from flanneld_py.daemon import filterwatch, heartbeats, hostwatch, inbox
from flanneld_py.daemon.reconciler import Reconciler

BEAT_EVERY, LIMIT = 0.1, 1.0


def _hanging(do_pass: Any) -> Any:
    def hang(reconciler: Reconciler, levels: inbox.Levels) -> None:
        if Path(reconciler._settings.subnet_file).with_name("hang").exists():
            threading.Event().wait()
        do_pass(reconciler, levels)

    return hang


if __name__ == "__main__":
    for module in (inbox, hostwatch, filterwatch):
        module.BEAT_EVERY = BEAT_EVERY  # type: ignore[attr-defined]
    heartbeats.LIMITS["reconciler"] = LIMIT
    Reconciler._pass = _hanging(Reconciler._pass)  # type: ignore[method-assign]
    main()
