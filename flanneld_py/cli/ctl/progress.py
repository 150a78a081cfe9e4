"""A word on stderr for a person who waits."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

PATIENCE = 2.0
"""Seconds after which silence looks like a defect."""


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Say on a terminal that `what` is waited for, once that lasts."""
    if not sys.stderr.isatty() or threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(
        signal.SIGALRM, lambda *_: click.echo(f"waiting for {what} ... (Ctrl-C to give up)", err=True)
    )
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
