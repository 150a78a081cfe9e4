"""flanneld-py for which time flies: what it does every so many seconds it does FASTER times as often.

What only keeps it from giving up too soon (deadlines of calls) or too often (pauses between attempts) stays.
"""

from __future__ import annotations

import os
import sys

from flanneld_py.cli.daemon import main

# The modules must be there before their numbers are changed.
from flanneld_py.daemon import run  # noqa: F401

FASTER = float(os.environ["FASTER"])
SHORTEST = 0.05
"""Seconds; a busy machine has other work to do."""
PERIODS = (
    # core/renewal.py
    *("RENEW_AT_MOST_EVERY", "HEAL_AT_MOST_EVERY"),
    # core/pace.py, core/linger.py
    *("SHORTEST_PROBE", "LONGEST_PROBE", "WIPE_WITHIN", "WIPE_GRACE"),
    # daemon/registrywatch.py, drivers/etcdwatch.py
    *("RELIST_AFTER", "DISTRUST_AT_MOST_EVERY", "LOOK_SECONDS"),
    # daemon/reconciler.py
    *("READ_BACK_SMALL", "READ_BACK_LARGE"),
    # daemon/registrymemory.py, daemon/leftout.py
    *("WRITE_EVERY", "TIME_TOLD_EVERY", "PERIOD"),
)


def speed_up() -> None:
    """Each of PERIODS, wherever it is known by its name."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("flanneld_py."):
            for period in PERIODS:
                seconds = getattr(module, period, None)
                if isinstance(seconds, float):
                    found.add(period)
                    setattr(module, period, max(seconds / FASTER, SHORTEST))
    assert found == {*PERIODS}, f"no longer there: {set(PERIODS) - found}"


if __name__ == "__main__":
    speed_up()
    main()
