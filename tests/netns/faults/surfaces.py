"""Everything by which a daemon tells how it is: both health pages, metrics, status, log, flannelctl."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from flanneld_py.lab.entering import inside
from tests.netns.test_ctl import flannelctl
from tests.netns.test_daemon import ask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flanneld_py.lab import Host

HEALTH_PORT, METRICS_PORT = 8471, 8473
OBSERVED = (
    f"--healthz-port={HEALTH_PORT}",
    "--healthz-ip=127.0.0.1",
    f"--metrics-addr=127.0.0.1:{METRICS_PORT}",
)
"""Flags of a daemon that is asked on every surface."""
REPAIRS = "flanneld_drift_repaired_total"


@dataclass(frozen=True, slots=True)
class Surfaces:
    """What a daemon said at one moment; name of a check → whether it is well, and its text."""

    alive: int
    """HTTP status of /healthz, of /readyz …"""
    ready: int
    live_checks: Mapping[str, tuple[bool, str]]
    ready_checks: Mapping[str, tuple[bool, str]]
    metrics: Mapping[tuple[str, ...], float]
    """(name, values of its labels by their names …) → value."""
    status: Mapping[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def of(cls, host: Host) -> Surfaces:
        alive, live = _page(host, HEALTH_PORT, "/healthz")
        ready, body = _page(host, HEALTH_PORT, "/readyz")
        samples = (
            sample
            for family in text_string_to_metric_families(_page(host, METRICS_PORT, "/metrics")[1])
            for sample in family.samples
        )
        metrics = {(s.name, *dict(sorted(s.labels.items())).values()): s.value for s in samples}
        log = host.daemon.log_lines()
        return cls(alive, ready, _checks(live), _checks(body), metrics, _status(host), log)

    def contradictions(self) -> Iterator[str]:
        """Where one surface says other than another, whatever is the matter."""
        if self.status.get("ready") != (self.ready == 200):
            yield f"/readyz answers {self.ready}, the status says ready: {self.status.get('ready')}"
        if self.metrics.get(("flanneld_ready",)) != (self.ready == 200):
            yield f"/readyz answers {self.ready}, flanneld_ready is not that"
        if (self.ready == 200) != all(well for well, _ in self.ready_checks.values()):
            yield f"/readyz answers {self.ready}, its lines say {self.ready_checks}"
        for kind, checks in (("live", self.live_checks), ("ready", self.ready_checks)):
            for name, (well, text) in checks.items():
                if self.metrics.get(("flanneld_health_reporter", kind, name)) != well:
                    yield f"check {name} ({kind}) is {text!r}, and another in the metrics"
        for name, (well, text) in self.ready_checks.items():
            told = self.status.get("checks", {}).get(name, {})
            if told.get("ok") != well:
                yield f"check {name} is {text!r} in /readyz, {told} in the status"

    def silent(self, check: str, says: str, logged: str, first_line: int) -> Iterator[str]:
        """Which surfaces do not tell of a fault yet.

        Args:
            check: that must name it.
            says: part of what it then says.
            logged: part of the log line.
            first_line: of the log, since the fault.
        """
        if self.alive != 200:
            yield f"/healthz answers {self.alive}"
        if says not in self.ready_checks.get(check, (True, ""))[1]:
            yield f"/readyz says of {check}: {self.ready_checks.get(check)}"
        if says not in str(self.status.get("checks", {}).get(check, {}).get("reason")):
            yield f"the status says of {check}: {self.status.get('checks', {}).get(check)}"
        if not any(logged in json.dumps([*line.values()]) for line in self.log[first_line:]):
            yield f"the log does not say {logged!r}"

    def troubles(self) -> Iterator[str]:
        """What is not well yet."""
        if (self.alive, self.ready) != (200, 200):
            yield f"/healthz answers {self.alive}, /readyz {self.ready}: {self.ready_checks}"
        if (self.status.get("state"), self.status.get("problems")) != ("in sync", []):
            yield f"{self.status.get('state')}, problems {self.status.get('problems')}"
        for name, check in self.status.get("checks", {}).items():
            if not check["ok"] or check["reason"].startswith(("unreachable", "refused", "not as it should")):
                yield f"check {name}: {check['reason']}"
        if self.metrics.get(("flanneld_registry_up",)) != 1:
            yield "flanneld_registry_up is not 1"

    def repairs(self) -> dict[str, float]:
        """Table → rows put right, by metrics and status alike; the log names them."""
        counted = {name[1]: value for name, value in self.metrics.items() if name[0] == REPAIRS and value}
        told = self.status.get("drift", {}).get("repaired", {})
        return counted if counted == {table: count for table, count in told.items() if count} else {}


def command_says(host: Host, says: str) -> str:
    """What is wrong with `flannelctl status`, which must say it and exit with 1; empty: nothing."""
    said = flannelctl(host, "status")
    good = said.code == 1 and says in said.out
    return "" if good else f"flannelctl status exits with {said.code} and says {said.out!r}, not {says!r}"


def command_is_well(host: Host) -> str:
    """The same when nothing may be wrong any more."""
    said = flannelctl(host, "status")
    return "" if said.code == 0 else f"flannelctl status exits with {said.code} and says {said.out!r}"


def _status(host: Host) -> dict[str, Any]:
    """As the daemon says it by its socket; empty while it does not answer."""
    with suppress(OSError, ValueError):
        result: dict[str, Any] = ask(host, "status")["result"]
        return result
    return {}


def _page(host: Host, port: int, path: str) -> tuple[int, str]:
    """(0, "") while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        with inside(host):
            connection.sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def _checks(body: str) -> dict[str, tuple[bool, str]]:
    rows = (line.split(maxsplit=2) for line in body.splitlines() if line.startswith("["))
    return {name.rstrip(":"): (sign == "[+]", text) for sign, name, text in rows}
