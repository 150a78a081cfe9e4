"""How the demo speaks: what happens, when it happens, and what came of it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check of one backend found."""

    backend: str
    check: str
    result: str
    passed: bool


class Narrator:
    """Prints to standard output, in colour only on a terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._colours = sys.stdout.isatty()

    def _print(self, text: str, *codes: int) -> None:
        if codes and self._colours:
            text = f"\033[{';'.join(map(str, codes))}m{text}\033[0m"
        print(text, flush=True)

    def heading(self, text: str) -> None:
        self._print(f"\n=== {text} ===", 1)

    def say(self, text: str) -> None:
        """One line, with the seconds since start."""
        self._print(f"{time.monotonic() - self._started:6.1f} s  {text}")

    def command(self, argv: Sequence[str], environment: str = "") -> None:
        """A command as one would type it."""
        self._print(f"          $ {environment}{shlex.join(argv)}", 36)

    def lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._print(f"            {line}", 2)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.lines(tabulate(rows, headers, tablefmt="plain", disable_numparse=True).splitlines())

    def finding(self, finding: Finding) -> None:
        verdict, colour = ("ok", 32) if finding.passed else ("FAILED", 31)
        elapsed = f"{time.monotonic() - self._started:6.1f} s"
        self._print(f"{elapsed}  {verdict}: {finding.check}: {finding.result}", colour)

    def summary(self, findings: Sequence[Finding]) -> None:
        self.heading("summary")
        rows = [(f.backend, f.check, f.result if f.passed else f"FAILED: {f.result}") for f in findings]
        headers, widths = ("backend", "check", "result"), [None, None, 70]
        self._print(tabulate(rows, headers, tablefmt="simple", maxcolwidths=widths))
        failed = sum(not finding.passed for finding in findings)
        elapsed = time.monotonic() - self._started
        if failed:
            self._print(f"\n{failed} of {len(findings)} checks failed ({elapsed:.0f} s)", 1, 31)
        else:
            self._print(f"\nall {len(findings)} checks passed ({elapsed:.0f} s)", 1, 32)
