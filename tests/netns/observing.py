"""What daemons and pings show, and waiting for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flanneld_py.lab import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Daemon, Host, PingRun

ENOUGH_ANSWERS = 20
"""To a ping, before and after what it must survive."""


def wait_status(
    daemon: Daemon, what: str, holds: Callable[[dict[str, Any]], object], timeout: float = 5
) -> dict[str, Any]:
    """The daemon's own status.json, not that of an earlier run, as soon as it holds."""
    pid = daemon.pid
    return wait_for(daemon.status, timeout, what, lambda seen: seen.get("pid") == pid and holds(seen))


def wait_in_sync(daemon: Daemon) -> None:
    daemon.wait_ready()
    wait_status(daemon, "the daemon to be in sync", lambda seen: seen["state"] == "in sync")


def wait_held(daemon: Daemon, key: str) -> None:
    wait_status(
        daemon,
        f"lease {key} to be held",
        lambda seen: (seen["lease"]["state"], seen["lease"]["key"]) == ("held", key),
    )


def codes(status: dict[str, Any]) -> list[str]:
    """Of its problems."""
    return [problem["code"] for problem in status["problems"]]


def wait_problem(daemon: Daemon, code: str, part: str = "") -> dict[str, Any]:
    """Until it has this problem and no other, with `part` in the reason; the whole status."""
    return wait_status(
        daemon,
        f"problem {code}, {part!r}",
        lambda seen: codes(seen) == [code] and part in seen["problems"][0]["reason"],
    )


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    """The log lines of one kind of event."""
    return [line for line in daemon.log_lines() if line["event"] == name]


def start_pings(source: Host, target: Host) -> PingRun:
    """Pod to pod, answered when this returns."""
    ping = source.pod.start_ping(target.pod.address)
    wait_answers(ping)
    return ping


def wait_answers(ping: PingRun) -> None:
    """Some more of them than until now."""
    answered = ping.answered()
    wait_for(ping.answered, 5, "answers to a ping", lambda count: count >= answered + ENOUGH_ANSWERS)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, of all its threads (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
