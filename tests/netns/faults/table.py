"""Writes the table of faults into a document: `python -m tests.netns.faults.table ROWS DOCUMENT`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.netns.scenes import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Row = dict[str, Any]
BEGIN, END = "<!-- faults: made by `make reliability` -->", "<!-- end of faults -->"
HOST = "The host"
SECTIONS = {
    "test_start_without_etcd": "Start without etcd",
    "test_kept_state": "Start without etcd",
    "test_lease": "Leases",
    "test_registry": "etcd",
    "test_outages": "etcd",
    "test_wipe_hold": "etcd",
}
"""How a test file's name begins → the section of its rows; all others are of HOST."""
ORDER = ("etcd", "Leases", "Start without etcd", HOST)
COLUMNS = ("fault", "what holds", "check that names it", "told after", *BACKENDS)


def render(rows: Iterable[Row], commit: str, date: str) -> str:
    """The text between the markers; `rows` as rows.py writes them, in order."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[_section(row["test"]), row["fault"]].append(row)
    everything = [row for group in groups.values() for row in group]
    return "\n\n".join(
        [
            BEGIN,
            _summary(everything, commit, date),
            *(
                f"### {section}\n\n{_table(name_and_rows)}"
                for section in ORDER
                if (name_and_rows := {name: g for (s, name), g in groups.items() if s == section})
            ),
            END,
        ]
    )


def _summary(rows: list[Row], commit: str, date: str) -> str:
    tried = {(row["fault"], row["backend"]) for row in rows}
    held = {(row["fault"], row["backend"]) for row in rows if row["holds"]}
    cpu = max((row["cpu"] for row in rows if row["cpu"] is not None), default=0.0)
    once = sum(not row["holds"] and (row["fault"], row["backend"]) in held for row in rows)
    return (
        f"Commit {commit}, {date}: {len(held)} of {len(tried)} hold"
        f"{f', {once} of them at the second try' if once else ''}. The most that a daemon used while a fault "
        f"lasted was {100 * cpu:.1f} % of a core."
    )


def _section(test: str) -> str:
    stem = test.partition("::")[0].rpartition("/")[2].removesuffix(".py")
    return next((section for start, section in SECTIONS.items() if stem.startswith(start)), HOST)


def _table(groups: dict[str, list[Row]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for fault, rows in groups.items():
        told = max((row["told"] for row in rows if row["told"] is not None), default=None)
        cells = [_cell([row for row in rows if row["backend"] == backend]) for backend in BACKENDS]
        check = rows[-1]["check"] or "-"
        lines.append("| " + " | ".join([fault, rows[-1]["expected"], check, _seconds(told), *cells]) + " |")
    return "\n".join(lines)


def _cell(rows: list[Row]) -> str:
    """The worst of those that held; the others were tried again, or there is nothing better to tell."""
    held = [row for row in rows if row["holds"]]
    if not held:
        return "**fails**" if rows else ""
    return ", ".join(_told(held)) or "holds"


def _told(rows: list[Row]) -> Iterator[str]:
    back = [row["recovered"] for row in rows if row["recovered"] is not None]
    lost = [row["lost"] for row in rows if row["lost"] is not None]
    if back:
        yield _seconds(max(back))
    if lost:
        yield f"{max(lost)} lost"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def main() -> None:
    """Raises SystemExit when the document has no place for the table."""
    source, document = Path(sys.argv[1]), Path(sys.argv[2])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{document} has no {BEGIN} … {END}")
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    date = datetime.now(UTC).strftime("%d %B %Y").lstrip("0")
    document.write_text(before + render(rows, commit, date) + after)


if __name__ == "__main__":
    main()
