"""A control socket for flannelctl to ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flanneld_py.daemon.control import Control


@contextmanager
def daemon(directory: Path, **answers: Callable[[], Any]) -> Iterator[Path]:
    """The daemon's own server, for a subnet file in `directory`."""
    path = directory / "flanneld-py.sock"
    control = Control(path, answers)
    thread = threading.Thread(target=control.run)
    thread.start()
    try:
        yield path
    finally:
        control.stop()
        thread.join(5)
        assert not thread.is_alive()
