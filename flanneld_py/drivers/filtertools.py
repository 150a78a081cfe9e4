"""The tools by which packet-filter rules are written: nft, and iptables in its two variants."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct, field

from flanneld_py.core.rules import Tool

Where: TypeAlias = Literal["nft", "legacy"]
BUDGET = 5.0
"""Seconds for all runs of one batch: as long as a tool runs, nothing else is done about the kernel."""
REST = 2
"""How many times as long no tool is run after a batch that had to be cut short."""
LOCK_WAIT = 2
"""Seconds that iptables itself waits for its lock."""
VERSION_WAIT = 2.0
"""Seconds for `--version`, which takes no lock."""
RANDOM_FULLY = (1, 6, 2)
"""The first iptables that has MASQUERADE --random-fully."""
MOST_TOLD = 300
"""Characters of what a tool said that go into a message."""


class Tools(Struct, frozen=True):
    """What is installed here."""

    nft: str = ""
    """Its path; empty: none."""
    restore: Mapping[tuple[Where, str], str] = field(default_factory=dict)
    """(variant, family `ip` or `ip6`) → path of its iptables-restore."""
    default: Where | None = None
    """The variant of plain `iptables`."""
    random_fully: bool = True

    def choose(self, *, nftables: bool) -> Tool | None:
        """Which one writes our rules: that of the config, or the only one there is; None: there is none."""
        if self.nft and (nftables or self.default is None):
            return "nft"
        if self.default is None:
            return None
        return "iptables-nft" if self.default == "nft" else "iptables-legacy"


def find_tools() -> Tools:
    """Look for them in $PATH, and in the folders of the administrator's commands."""
    restore: dict[tuple[Where, str], str] = {}
    variants: tuple[Where, ...] = ("nft", "legacy")
    for variant in variants:
        for family, name in (("ip", "iptables"), ("ip6", "ip6tables")):
            if path := _find(f"{name}-{variant}-restore"):
                restore[variant, family] = path
    default, version = _plain_iptables()
    if default is not None:
        for family, name in (("ip", "iptables"), ("ip6", "ip6tables")):
            if path := _find(f"{name}-restore"):
                restore.setdefault((default, family), path)
    return Tools(_find("nft"), restore, default, default is None or version >= RANDOM_FULLY)


def _find(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin") or ""


def _plain_iptables() -> tuple[Where | None, tuple[int, ...]]:
    """Variant and version of `iptables-restore`: only it can tell which of the two it is."""
    path = _find("iptables-restore")
    if not path:
        return None, ()
    ended = _run([path, "--version"], "", VERSION_WAIT)
    found = re.search(r"v(\d+(?:\.\d+)*)", ended.stdout) if ended else None
    if ended is None or ended.returncode != 0 or not found:
        return None, ()  # it is there, and does not work
    version = tuple(int(part) for part in found[1].split("."))
    return ("nft" if "nf_tables" in ended.stdout else "legacy"), version


class ToolRuns:
    """Runs tools, one at a time, within a budget. `interrupt` is for another thread."""

    def __init__(self, budget: float = BUDGET) -> None:
        """`budget`: seconds for one batch."""
        self._budget = budget
        self._until = 0.0
        self._rest_until = 0.0
        self._slow = ""
        """What was said of the run that used up the budget."""
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._interrupted = False

    def begin(self) -> None:
        """A new batch."""
        now = time.monotonic()
        if now >= self._rest_until:
            self._until, self._slow = now + self._budget, ""

    def run(self, argv: list[str], script: str) -> str | None:
        """Hand a script to a tool; None: it was carried out, else what was said against it."""
        left = self._until - time.monotonic()
        if left <= 0:
            return self._slow or "not tried yet, as the tables before it took all the time there is"
        ended = _run(argv, script, left, self._note)
        if self._interrupted:
            return f"{argv[0]} was ended, as the daemon stops"
        if ended is None:
            self._slow = (
                f"{argv[0]} had not ended after {left:.1f} s and was killed; see what holds it up: who has "
                "its lock, who changes rules all the time"
            )
            self._until, self._rest_until = 0.0, time.monotonic() + REST * self._budget
            return self._slow
        if ended.returncode == 0:
            return None
        said = " ".join((ended.stderr or ended.stdout).split())[:MOST_TOLD]
        return f"{argv[0]}: {said or f'exited with {ended.returncode}'}"

    def interrupt(self) -> None:
        """End what runs, and run nothing more."""
        with self._lock:
            self._interrupted = True
            if self._running is not None:
                _kill(self._running)

    def _note(self, process: subprocess.Popen[str] | None) -> None:
        with self._lock:
            self._running = process
            if process is not None and self._interrupted:
                _kill(process)


class _Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def _run(
    argv: list[str],
    text: str,
    timeout: float,
    note: Callable[[subprocess.Popen[str] | None], None] = lambda _: None,
) -> _Ended | None:
    """How a command ended; None: it did not in time, and was killed, with what it has started.

    `note` is told of the process while it runs.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", process_group=0
        )
    except OSError as error:
        return _Ended(os.EX_UNAVAILABLE, "", f"cannot be run: {error.strerror}")
    note(process)
    try:
        said = process.communicate(text, timeout)
        return _Ended(process.returncode, *said)
    except subprocess.TimeoutExpired:
        return None
    finally:
        note(None)
        _kill(process)
        process.wait()
        for end in (process.stdin, process.stdout, process.stderr):
            if end is not None:
                with suppress(OSError):
                    end.close()


def _kill(process: subprocess.Popen[str]) -> None:
    """With its children, if it has not ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
