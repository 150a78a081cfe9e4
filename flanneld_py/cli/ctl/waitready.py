"""flannelctl wait-ready: for service managers that know no readiness, and for scripts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from msgspec import Struct

from flanneld_py.cli.ctl.control import ANSWER_SECONDS, START, NoAnswer, ask, read_status_file
from flanneld_py.cli.ctl.progress import PATIENCE
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.status import checked
from flanneld_py.cli.ctl.text import echo_json, printable
from flanneld_py.core.duration import duration, parse_duration
from flanneld_py.errors import FlanneldError, UsageError

DEFAULT_TIMEOUT = "60s"
LOG = "if it was started, its log says why it ended (journalctl -u flanneld-py, or supervisord's)"
INTERVAL = 0.1
SHORTEST_ANSWER = 0.5
"""Seconds a daemon has at least to answer, however little of the timeout is left."""


class Seen(Struct, frozen=True):
    """One look at the daemon."""

    status: Mapping[str, Any] | None
    """None: there is no daemon, or it cannot be asked."""
    obstacle: str = ""
    """Why it is not ready; empty: it is."""
    fix: str = ""

    def __str__(self) -> str:
        return printable("; ".join(part for part in (self.obstacle, self.fix) if part))


@click.command("wait-ready")
@click.option(
    "--timeout",
    "timeout_text",
    metavar="DURATION",
    default=DEFAULT_TIMEOUT,
    show_default=True,
    help="How long to wait, such as 90s or 5m; 0: look once.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="An object with the keys ready, waited (seconds), reason, fix, subnets, pid.",
)
@with_settings
def wait_ready(settings: Settings, timeout_text: str, as_json: bool) -> int:
    """Wait until this host's daemon is ready: the lease is held, and subnet.env stands.

    That etcd is away is no reason to wait, once they are there.

    After two seconds it says on stderr what it waits for. Exit 0: ready; 1: not in time, with the daemon's
    reason.
    """
    try:
        timeout = parse_duration(timeout_text)
    except ValueError as error:
        raise UsageError(f"--timeout {error}") from None
    begun = time.monotonic()
    seen = _wait(settings, begun, timeout)
    waited = time.monotonic() - begun
    subnets = list(seen.status["subnets"]) if seen.status else []
    if as_json:
        fields = {"reason": seen.obstacle or None, "fix": seen.fix or None, "subnets": subnets}
        pid = seen.status["pid"] if seen.status else None
        echo_json({"ready": not seen.obstacle, "waited": round(waited, 3), **fields, "pid": pid})
    elif not seen.obstacle:
        click.echo(f"ready: {', '.join(map(printable, subnets))}")
    else:
        raise FlanneldError(f"not ready after {duration(waited)}: {seen}")
    return 1 if seen.obstacle else 0


def _wait(settings: Settings, begun: float, timeout: float) -> Seen:
    """Look until it is ready or the time is over; the last look."""
    told = ""
    while True:
        left = begun + timeout - time.monotonic()
        seen = look(settings, min(ANSWER_SECONDS, max(left, SHORTEST_ANSWER)))
        left = begun + timeout - time.monotonic()
        if not seen.obstacle or left <= 0:
            return seen
        if time.monotonic() - begun >= PATIENCE and seen.obstacle != told:
            told = seen.obstacle
            click.echo(f"flannelctl: waiting for flanneld-py to be ready: {seen}", err=True)
        time.sleep(min(INTERVAL, left))


def look(settings: Settings, answer_seconds: float) -> Seen:
    """Ask the daemon; where only root may, take its file if it is alive.

    Args:
        settings: which daemon is meant.
        answer_seconds: how long it may take to answer.
    """
    socket = settings.control_socket
    try:
        status = checked(ask(socket, "status", answer_seconds), socket)
    except NoAnswer as error:
        found = _from_file(settings)
        if found is None:
            log = f"; {LOG}" if error.advice == START else ""
            return Seen(None, f"no daemon answers: {error}", error.advice + log)
        status = found
    except FlanneldError as error:
        return Seen(None, str(error))
    return judge(status, settings.prefix)


def _from_file(settings: Settings) -> Mapping[str, Any] | None:
    """The status in the file, if the daemon that wrote it is alive and is only not ours to ask."""
    socket, path = settings.control_socket, settings.status_file
    if os.access(socket, os.W_OK):
        return None
    stored = read_status_file(path)
    try:
        status = checked(stored, path)
        # The number of a daemon that is gone may be another program's.
        command = Path(f"/proc/{status['pid']}/cmdline").read_bytes()
    except (OSError, FlanneldError):
        return None
    return status if b"flanneld" in command else None


def judge(status: Mapping[str, Any], prefix: str) -> Seen:
    """Whether a status is that of the daemon that is meant, ready."""
    if status["prefix"] != prefix:
        obstacle = f"this is the daemon with --etcd-prefix {status['prefix']}, not {prefix}"
        return Seen(status, obstacle, "give its prefix, or the --subnet-file of the other")
    if status["ready"] or _lacks_only_etcd(status):
        return Seen(status)
    first = next(iter(status["problems"]), None)
    if first is not None:
        return Seen(status, first["reason"], first["fix"])
    return Seen(status, f"{status['state']}: registry {status['registry']['state']}")


def _lacks_only_etcd(status: Mapping[str, Any]) -> bool:
    """Whether all but etcd is well, lease and subnet.env among it: containers may be started."""
    return [name for name, check in (status.get("checks") or {}).items() if not check["ok"]] == ["registry"]
