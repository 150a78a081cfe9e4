"""Hosts that start while etcd is away: what they keep for that, how they boot, what they then say."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanneld_py.lab import wait_for
from tests.netns.observing import codes, events, wait_status
from tests.netns.oracle import Rows, actual, own_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flanneld_py.lab import Host

REACHED_WITHIN = 3.0
"""Seconds from the start of the daemons until pods reach each other: promised of a machine …"""
USUAL_START = 1.0
"""… on which a start with etcd takes less than so many; on one that does much else both take longer …"""
TRIES = 3
"""… and the best of so many counts."""
IN_SYNC_WITHIN = 10.0
WRITE_EVERY = 5.0
"""Seconds between two writings of what is kept."""
NAME = "registry"
ASIDE = ".unusable"


@dataclass(frozen=True, slots=True)
class Before:
    """What stood on a host."""

    rows: Rows
    env: bytes
    key: str


def kept(host: Host) -> Path:
    return host.state_directory / NAME


def kept_roles(host: Host) -> dict[str, str]:
    """Key of each record in the file → what it was to this host: peer, held, or other."""
    lines = kept(host).read_text().splitlines()[1:-1] if kept(host).exists() else []
    return {key: role for key, role, *_ in map(json.loads, lines)}


def wait_kept(host: Host, keys: set[str]) -> None:
    """Until the file has these records."""
    records = f"the records in {kept(host)}"
    wait_for(lambda: kept_roles(host).keys(), WRITE_EVERY + 5, records, lambda seen: seen == keys)


def switch_off(*hosts: Host, backend: str) -> dict[str, Before]:
    """End the daemons in order once they have kept what they know; what stood then, by host."""
    keys = set(hosts[0].etcd.leases())
    before = {}
    for host in hosts:
        wait_kept(host, keys)
        before[host.name] = Before(actual(host, backend), host.subnet_file.read_bytes(), own_key(host))
        assert host.daemon.terminate() == 0
    return before


def boot(*hosts: Host, args: tuple[str, ...] = ()) -> float:
    """Power on, all at once, with nothing but the disk; pods start as soon as they may. When that began."""
    for host in hosts:
        host.reboot()
    began = time.monotonic()
    for host in hosts:
        host.start_daemon(args)
    for host in hosts:
        host.daemon.wait_ready()
        host.attach_pods()
    return began


def wait_reached(source: Host, target: Host, began: float) -> float:
    """Until pods reach each other; the seconds since then."""
    wait_for(lambda: source.pod.ping(target.pod.address, count=1, wait=0.2).received, 10, "an answer")
    return time.monotonic() - began


def promised(*hosts: Host) -> float:
    """Seconds in which pods have to reach each other, on a machine as busy as this one."""
    usual = max(host.daemons[0].ready_after() or 0.0 for host in hosts)
    return REACHED_WITHIN * max(1.0, usual / USUAL_START)


def boot_in_time(*hosts: Host, ways: Sequence[tuple[Host, Host]], args: tuple[str, ...]) -> float:
    """Until pods reach each other on these ways, in the time that is promised; how long that took."""
    took: list[float] = []
    longest = promised(*hosts)
    while not took or (min(took) > longest and len(took) < TRIES):
        began = boot(*hosts, args=args)
        took.append(max(wait_reached(one, other, began) for one, other in ways))
    assert min(took) <= longest, took
    return min(took)


def wait_sync(*hosts: Host) -> None:
    for host in hosts:
        wait_status(
            host.daemon,
            "all to be well",
            lambda s: s["state"] == "in sync" and s["ready"] and not s["problems"],
            IN_SYNC_WITHIN,
        )


def running_on(host: Host) -> str:
    """The time of the state that the daemon says it runs on, everywhere the same."""
    status = wait_status(
        host.daemon,
        "all to be well but for the registry",
        lambda s: [name for name, check in s["checks"].items() if not check["ok"]] == ["registry"],
    )
    of: str = status["registry"]["running_on_state_of"]
    told = f"unreachable, running on state of {of}"
    assert status["checks"]["registry"]["ok"] is False
    assert status["checks"]["registry"]["reason"].startswith(told)
    assert codes(status) == ["registry-unreachable"]
    assert f"running on state of {of}" in status["problems"][0]["reason"]
    assert (status["ready"], status["lease"]["state"]) == (False, "held")
    (line,) = events(host.daemon, "running_on_state")
    assert (line["level"], line["of"]) == ("warning", of)
    return of
