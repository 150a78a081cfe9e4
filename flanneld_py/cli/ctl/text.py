"""Words for people: ages, counts, tables; and what strangers wrote, made harmless for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from flanneld_py.core.duration import duration


def lasting(since: str, now: datetime) -> str:
    """`for 4 min`, from an ISO 8601 time until now; a text that is none comes back."""
    try:
        seconds = (now - datetime.fromisoformat(since)).total_seconds()
    except (ValueError, TypeError):
        return f"since {printable(since)}"
    return f"for {duration(seconds)}"


def utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def count(number: int, noun: str) -> str:
    """`1 peer`, `2 peers`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def printable(text: object) -> str:
    """Control characters escaped: anybody who may write to etcd could otherwise steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Columns under their headers; cells are made printable, and nothing is taken for a number."""
    # 15 ms, for the commands that print none.
    import tabulate  # noqa: PLC0415

    # Two columns more for each header are what a terminal of 80 lacks.
    tabulate.MIN_PADDING = 0
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = tabulate.tabulate(cells, headers, tablefmt="plain", disable_numparse=True).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))
