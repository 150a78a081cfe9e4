"""flannelctl status: what the daemon is doing, on one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
from msgspec import Struct

from flanneld_py.cli.ctl.control import START, NoAnswer, ask, read_status_file
from flanneld_py.cli.ctl.settings import Settings, with_settings
from flanneld_py.cli.ctl.shape import has_shape
from flanneld_py.cli.ctl.text import count, echo_json, lasting, printable
from flanneld_py.core.describe import NOUNS, WAITS
from flanneld_py.core.duration import duration
from flanneld_py.daemon.lock import holder_of
from flanneld_py.daemon.status import what_stays
from flanneld_py.errors import FlanneldError

STOPPED = "stopped"
"""State in the last status of a daemon that came to an orderly end."""
PUT_BACK = "it puts its socket back within seconds, or has another --subnet-file"
START_AGAIN = "start flanneld-py; if it does not stay, its log says why (journalctl -u flanneld-py)"
"""Also for wrong flags, of which no status tells."""
SHOWN = 5
"""Rows of a list before "and … more"."""
LABEL_WIDTH = 11
COLOURS = {
    "in sync": "green",
    "held": "green",
    "degraded": "red",
    "lost": "red",
    "conflict": "red",
    "killed": "red",
}
"""State → colour; the states between are yellow."""
TEXT, NUMBER, TEXTS = (str,), (int,), [(str,)]
WAY = {"packets": NUMBER, "drops": {}}
PLANE = {
    "device": TEXT,
    "runs": (str, None),
    "why": (str, None),
    "offloads": TEXTS,
    "restarts": NUMBER,
}
SHAPE: dict[str, Any] = {
    **dict.fromkeys(("version", "state", "prefix", "node_id"), TEXT),
    "pid": NUMBER,
    "ready": (bool,),
    "backend": (str, None),
    "mtu": (int, None),
    **dict.fromkeys(("networks", "subnets"), TEXTS),
    "external": ({"name": TEXT, "mtu": NUMBER, "addresses": TEXTS, "public": TEXTS}, None),
    "lease": {"state": TEXT, "key": (str, None), "ttl": (int, None)},
    "registry": {
        **dict.fromkeys(("state", "since"), TEXT),
        "endpoint": (str, None),
        "revision": (int, None),
    },
    "peers": {"count": NUMBER, "held": NUMBER, "bad": {}, "bad_count": NUMBER},
    "drift": {"repaired": {}, "failed": [{"op": TEXT, "error": TEXT}]},
    "problems": [dict.fromkeys(("code", "reason", "fix", "since"), TEXT)],
}
"""What we need of a status (docs/architecture.md, "Status"); other keys came later, and may be missing."""


class Told(Struct, frozen=True):
    """A status and where it is from."""

    status: Mapping[str, Any]
    source: Literal["daemon", "file"]
    silence: str = ""
    """With a file: why no daemon answered."""
    written: datetime | None = None
    """With a file: when."""

    @property
    def well(self) -> bool:
        return self.source == "daemon" and self.status["ready"] and not self.status["problems"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The status object, with the key `source` added.")
@with_settings
def status(settings: Settings, as_json: bool) -> int:
    """What the daemon is doing, and what to do about each problem.

    Asks the daemon; if none answers, shows the status it wrote last. Exit 0: ready and without problems;
    1: anything else, also that it is the daemon of another prefix.
    """
    told = find_status(settings)
    tell_other_prefix(told.status, settings)
    if as_json:
        echo_json({**told.status, "source": told.source})
    else:
        click.echo(render(told, datetime.now(UTC)))
    return 0 if told.well and told.status["prefix"] == settings.prefix else 1


def tell_other_prefix(status: Mapping[str, Any], settings: Settings) -> None:
    """The files beside --subnet-file may be those of a daemon that is not meant."""
    if status["prefix"] != settings.prefix:
        click.echo(f"flannelctl: {other_prefix(status, settings)}", err=True)


def other_prefix(status: Mapping[str, Any], settings: Settings) -> str:
    """What to do about it."""
    return (
        f"this is the daemon with --etcd-prefix {printable(status['prefix'])}, "
        f"not {printable(settings.prefix)}; give its prefix, or the --subnet-file of the other"
    )


def find_status(settings: Settings) -> Told:
    """From the daemon, else from its file.

    Raises:
        FlanneldError: from neither.
    """
    try:
        return Told(checked(ask(settings.control_socket, "status"), settings.control_socket), "daemon")
    except NoAnswer as error:
        silence, advice = str(error), error.advice
    path = settings.status_file
    stored = read_status_file(path)
    running = holder_of(_prefix(stored) or settings.prefix)
    if running:
        advice = advice if advice != START else PUT_BACK
        silence += f", but {running}; {advice}"
    if stored is None and running:
        raise FlanneldError(f"the daemon does not answer: {silence}; there is no {path}")
    if stored is None:
        raise FlanneldError(f"no daemon has run here: {silence}, and there is no {path}; {advice}")
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    status = checked(stored, path)
    return Told(status if running else _ended(status, written), "file", silence, written)


def _prefix(stored: Mapping[str, Any] | None) -> str:
    prefix = (stored or {}).get("prefix")
    return prefix if isinstance(prefix, str) else ""


def _ended(status: Mapping[str, Any], written: datetime) -> Mapping[str, Any]:
    """What the last status means now that nobody works on its prefix any more."""
    if status["state"] == STOPPED:
        return status
    crashed = {
        "code": "killed",
        "reason": f"the daemon (pid {status['pid']}) was killed or crashed; when it last wrote it was "
        f"{status['state']}",
        "fix": "start flanneld-py, which takes over what still stands",
        "since": written.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
    return {**status, "state": "killed", "ready": False, "problems": [crashed, *status["problems"]]}


def checked(status: Any, origin: Path) -> Mapping[str, Any]:
    """A status that can be shown.

    Raises:
        FlanneldError: it is of another version, or damaged.
    """
    if not has_shape(status, SHAPE):
        raise FlanneldError(f"{origin}: not the status of this version, or damaged; restart the daemon")
    found: Mapping[str, Any] = status
    return found


# --- the view -------------------------------------------------------------------------------------


def render(told: Told, now: datetime) -> str:
    """The status as text of some twenty lines, with ANSI colours."""
    status = told.status
    lines = [*_head(told, now), ""]
    # What a dead daemon wrote held when it wrote.
    now = told.written or now
    for label, values in (
        ("backend", _backend(status)),
        *_data_plane(status),
        ("subnet", _subnets(status)),
        ("interface", _external(status["external"])),
        ("lease", _lease(status["lease"])),
        ("registry", _registry(status["registry"], now)),
        ("peers", _peers(status["peers"])),
        ("drift", _drift(status["drift"])),
    ):
        first, *more = values
        lines.append(f"  {label:<{LABEL_WIDTH}}{first}")
        lines += [f"  {'':<{LABEL_WIDTH}}{value}" for value in more]
    return "\n".join([*lines, *_problems(status["problems"], now)])


def _head(told: Told, now: datetime) -> Iterator[str]:
    status = told.status
    if told.written is not None:
        old = duration((now - told.written).total_seconds())
        yield click.style(f"No daemon answers on {told.silence}.", fg="red", bold=True)
        yield f"What follows is what it wrote {old} ago."
        if status["state"] == STOPPED and not status["problems"]:
            yield f"  fix: {START_AGAIN}"
        if status["state"] in (STOPPED, "killed") and status["backend"] == "udp":
            yield click.style(f"Backend udp: {what_stays('udp')}.", fg="red")
        yield ""
    ready = "ready" if status["ready"] else "not ready"
    if status["ready"] and status["problems"]:  # the exit code is then 1
        ready += f", {count(len(status['problems']), 'problem')}"
    node = printable(status["node_id"]) or "not known yet"
    yield (
        f"flanneld-py {printable(status['version'])}: {_state(status['state'], bold=True)}, {ready} "
        f"(pid {status['pid']}, prefix {printable(status['prefix'])}, node {node})"
    )
    if not status["ready"]:
        yield from (click.style(f"  not ready: {reason}", fg="yellow") for reason in failing_checks(status))


def failing_checks(status: Mapping[str, Any]) -> list[str]:
    """Why it is not ready, a text for each check that fails: `lease: conflict: 10.5.7.0-24 is …`."""
    checks = status.get("checks")
    if not isinstance(checks, dict):
        return []
    known = {"ok": (bool,), "reason": TEXT}
    return [
        printable(f"{name}: {check['reason']}")
        for name, check in checks.items()
        if has_shape(check, known) and not check["ok"]
    ]


def _state(state: str, *, bold: bool = False) -> str:
    return click.style(printable(state), fg=COLOURS.get(state, "yellow"), bold=bold)


def _backend(status: Mapping[str, Any]) -> Iterator[str]:
    if status["backend"] is None:
        yield "none: no valid network config yet"
    else:
        networks = status["networks"]
        families = " and ".join(dict.fromkeys("IPv6" if ":" in net else "IPv4" for net in networks))
        yield f"{status['backend']} in {', '.join(networks)} ({families})"
    offloads = status.get("offloads")
    for dev, how in offloads.items() if isinstance(offloads, dict) else ():
        yield f"checksum offload of {printable(dev)}: {printable(how)}"
    if rules_by := status.get("rules_by"):
        yield f"packet-filter rules by {printable(rules_by)}"


def _data_plane(status: Mapping[str, Any]) -> Iterator[tuple[str, Iterator[str]]]:
    """Rows of what forwards packets, where that is not the kernel."""
    plane: Any = status.get("data_plane")
    if has_shape(plane, PLANE):
        yield "data plane", iter([_plane(plane)])
        if has_shape(plane.get("traffic"), {"tx": WAY, "rx": WAY}):
            yield "traffic", iter([_traffic(plane["traffic"])])


def _plane(plane: Mapping[str, Any]) -> str:
    if not plane["runs"]:
        return click.style(f"none: nothing forwards on {printable(plane['device'])}", "red")
    runs = printable(plane["runs"])
    if runs == "python":
        runs += f" (slower): {printable(plane['why'] or 'not known why')}"
    port = f", port {plane['port']}" if has_shape(plane.get("port"), NUMBER) else ""
    offloads = " ".join(map(printable, plane["offloads"])) or "no offloads"
    return f"{runs}{port}, {offloads}, {count(plane['restarts'], 'restart')}"


def _traffic(traffic: Mapping[str, Any]) -> str:
    text = f"{count(traffic['tx']['packets'], 'packet')} to peers, {traffic['rx']['packets']} from them"
    dropped = [
        f"{way} {printable(reason)} {printable(str(number))}"
        for way in ("tx", "rx")
        for reason, number in traffic[way]["drops"].items()
    ]
    return text + (f"; dropped: {', '.join(dropped)}" if dropped else "")


def _subnets(status: Mapping[str, Any]) -> Iterator[str]:
    mtu = f", MTU {status['mtu']}{_capped(status)}" if status["mtu"] else ""
    inherited = status.get("inherited")
    if not status["subnets"] and has_shape(inherited, TEXTS) and inherited:
        yield f"none leased yet; subnet.env of the last run has {', '.join(map(printable, inherited))}"
        return
    yield (", ".join(status["subnets"]) or "none") + mtu


def _capped(status: Mapping[str, Any]) -> str:
    """Where the config's MTU is more than can be had; of an older daemon nothing is known."""
    external, options = status["external"], status.get("options")
    asked = options.get("external_mtu") if isinstance(options, dict) else 0
    if external is None or not isinstance(asked, int) or asked <= external["mtu"]:
        return ""
    return f" (the config's MTU, {asked}, is more than {printable(external['name'])} has)"


def _external(external: Mapping[str, Any] | None) -> Iterator[str]:
    if external is None:
        yield "none found"
        return
    text = f"{printable(external['name'])} {' '.join(external['addresses'])}, MTU {external['mtu']}"
    if external["public"] != external["addresses"]:
        text += f", published as {' '.join(external['public'])}"
    how = external.get("how")
    yield f"{text}, chosen by {printable(how)}" if how else text


def _lease(lease: Mapping[str, Any]) -> Iterator[str]:
    text = _state(lease["state"])
    if lease["key"]:
        lifetime = f"TTL {duration(lease['ttl'])}" if lease["ttl"] else "a reservation, which does not end"
        text += f" {printable(lease['key'])}, {lifetime}"
    yield text


def _registry(registry: Mapping[str, Any], now: datetime) -> Iterator[str]:
    text = f"{_state(registry['state'])} {lasting(registry['since'], now)}"
    if registry["endpoint"]:
        text += f", {printable(registry['endpoint'])}"
    of = registry.get("running_on_state_of")
    if isinstance(of, str):
        text += click.style(f", running on state of {printable(of)}", fg="yellow")
    if registry["revision"] is not None:
        text += f", revision {registry['revision']}"
    yield text


def _peers(peers: Mapping[str, Any]) -> Iterator[str]:
    bad: Mapping[str, str] = peers["bad"]
    number = max(peers["bad_count"], len(bad))
    remarks = f", {peers['held']} of them held as many records vanished at once" if peers["held"] else ""
    remarks += f", {count(number, 'record')} left out:" if bad else ""
    yield str(peers["count"]) + (click.style(remarks, "yellow") if remarks else "")
    rows = [f"{printable(key)}  {printable(reason)}" for key, reason in bad.items()]
    yield from _some(rows, number, "flannelctl leases lists all")


def _drift(drift: Mapping[str, Any]) -> Iterator[str]:
    repaired = ", ".join(
        f"{number} {_noun(table)} rows" if number != 1 else f"1 {_noun(table)} row"
        for table, number in drift["repaired"].items()
    )
    failed = drift["failed"]
    text = f"repaired since the start: {repaired or 'nothing'}"
    if failed:
        text += click.style(f"; {count(len(failed), 'op')} failing:", "red")
    yield text
    # One that waits for another repeats all of its error.
    roots = [row for row in failed if not row["error"].startswith(WAITS)] or failed
    rows = [f"{printable(row['op'])}: {printable(row['error'])}" for row in roots]
    yield from _some(rows, len(roots), "--json lists all")
    if len(roots) < len(failed):
        yield f"  {count(len(failed) - len(roots), 'op')} more that wait for others"


def _noun(table: str) -> str:
    return next((noun for name, noun in NOUNS.items() if name == table), printable(table))


def _some(rows: list[str], number: int, others: str) -> Iterator[str]:
    """`number`: how many there are, of which the rows may be but some; `others`: where the rest is found."""
    yield from (f"  {row}" for row in rows[:SHOWN])
    if number > SHOWN:
        yield f"  and {number - SHOWN} more ({others})"


def _problems(problems: list[Mapping[str, Any]], now: datetime) -> Iterator[str]:
    for problem in problems:
        code = click.style(printable(problem["code"]), fg="red", bold=True)
        yield ""
        yield f"{code} ({lasting(problem['since'], now)}): {printable(problem['reason'])}"
        if problem["fix"]:
            yield f"  fix: {printable(problem['fix'])}"
