"""What status.json says after a start that came to nothing, in the place of what an earlier run wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flanneld_py.core.hostfiles import status_path
from flanneld_py.core.statefile import parse_state
from flanneld_py.daemon.inbox import Levels, Problem
from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.daemon.options import Options
from flanneld_py.daemon.status import Process, compose
from flanneld_py.drivers.files import write_atomically

FIX = "put that right, then start flanneld-py again"


@contextmanager
def failure_told(options: Options) -> Iterator[None]:
    """To be entered when the locks are held: else the file may be that of a daemon that runs."""
    try:
        yield
    except Exception as error:
        process = Process(os.getpid(), options.etcd.prefix, options.node_id or _last_node_id(options))
        problem = Problem("start-failed", " ".join(str(error).split()) or type(error).__name__, FIX)
        status = compose(Levels(), process, ended=problem)
        with suppress(OSError):
            write_atomically(Path(status_path(str(options.subnet_file))), json.dumps(status, indent=1) + "\n")
        raise


def _last_node_id(options: Options) -> str:
    """By which `flannelctl leases` knows this host's record."""
    with suppress(OSError):
        saved = parse_state(read_regular(options.state_file) or "")
        return saved.node_id if saved is not None and saved.prefix == options.etcd.prefix else ""
    return ""
