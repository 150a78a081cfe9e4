"""What a run says in the end: for people, and as files."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.invariants import SHOWN

if TYPE_CHECKING:
    from tests.chaos.recording import Recording
    from tests.chaos.schedule import Schedule
    from tests.chaos.world import World

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "chaos"
RESULTS = BUILD / "results.jsonl"
AROUND = 25
"""Seconds that a run without violations takes besides its faults."""


def replay_command(schedule: Schedule, options: str, scenario: str) -> str:
    """The one line that does the same again."""
    setting = schedule.setting
    if scenario:
        return f".venv/bin/python -m tests.chaos --scenario={scenario!r}"
    if options:
        base = ".venv/bin/python -m tests.chaos"
        return f"{base} --seed={setting.seed} --seconds={setting.seconds:g}{options}"
    return f"make chaos SEED={setting.seed} SECONDS={setting.seconds:g}"


def heading(schedule: Schedule) -> str:
    """What is about to be done, and how long that takes."""
    setting = schedule.setting
    return (
        f"seed {setting.seed}: {setting.backend}, {setting.families}, TTL {setting.ttl} s, "
        f"{setting.seconds:g} s of faults, about {setting.seconds + AROUND:.0f} s in all"
    )


def summary(run: Recording, found: dict[str, list[str]]) -> str:
    """What was done and what was violated; the first violated invariant comes first."""
    setting = run.schedule.setting
    sent = sum(len(numbers) for numbers in run.traffic.sent.values())
    lost = sum(
        len(run.traffic.sent[way].keys() - run.traffic.received.get(way, {})) for way in run.traffic.sent
    )
    lines = [
        f"seed {setting.seed}: {setting.backend}, {setting.families}, TTL {setting.ttl} s, "
        f"{len(run.done)} faults in {run.healed - run.began:.0f} s ({len(run.skipped)} not possible), "
        f"{sent} probes ({_excused(run):.0%} of them while a fault excused their loss), {lost} lost, "
        f"{len(run.events)} revisions: "
        + (f"{len(found)} invariants violated" if found else "all invariants hold")
    ]
    for name, violated in found.items():
        lines.append(f"VIOLATED {name}")
        lines += [f"  {line}" for line in violated[:SHOWN]]
        if len(violated) > SHOWN:
            lines.append(f"  and {len(violated) - SHOWN} more")
    return "\n".join(lines)


def _excused(run: Recording) -> float:
    """The part of the probes whose loss would have told nothing."""
    times = [(*way[:2], at) for way, sent in run.traffic.sent.items() for at in sent.values()]
    told = sum(any(window.excuses(*each) for window in run.windows) for each in times)
    return told / len(times) if times else 0.0


def timeline(run: Recording) -> str:
    """What was really done when."""
    lines = [f"{run.time(d.start):>8} - {run.time(d.healed):>8}  {d}" for d in run.done]
    lines += [f"not possible: {line}" for line in run.skipped]
    lines += [f"{run.time(at):>8}  this machine stood still for {took:.1f} s" for at, took in run.seen.stalls]
    lines += [f"excused: {run.time(w.start)} - {run.time(w.end)}: {w.why}" for w in run.windows]
    return "\n".join(lines)


def write_files(world: World, run: Recording, text: str) -> Path:
    """Schedule, timeline, history, logs, statuses, violations: all that a failure is understood by."""
    directory = BUILD / f"seed-{run.schedule.setting.seed}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "violations.txt").write_text(text + "\n")
    (directory / "schedule.json").write_text(json.dumps(run.schedule.as_json(), indent=1))
    (directory / "timeline.txt").write_text(timeline(run) + "\n")
    (directory / "history.txt").write_text(
        "".join(
            f"{run.time(e.at)} rev={e.revision} lease={e.lease:x} {e.key} = {e.value}\n" for e in run.events
        )
    )
    (directory / "mirror.jsonl").write_text(run.mirror)
    (directory / "samples.txt").write_text(
        "".join(
            f"{run.time(s.at)} {s.host} {s.pid} {s.state} ready={s.ready} {' '.join(s.codes)}\n"
            for s in run.seen.samples
        )
    )
    (directory / "routes-gone.txt").write_text(
        "".join(f"{run.time(g.at)} {g.host} {g.destination}\n" for g in run.routes_gone)
    )
    for host in world.lab.hosts:
        kept = directory / host.name
        kept.mkdir()
        for file in (*host.directory.glob("*.log"), *host.run_directory.glob("*")):
            if file.is_file():
                shutil.copy(file, kept)
    return directory


def note_result(run: Recording, found: dict[str, list[str]]) -> None:
    """A line for the sum of all sittings; a commit with a + has changes beside it."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    setting = run.schedule.setting
    line = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "seed": setting.seed,
        "seconds": setting.seconds,
        "backend": setting.backend,
        "families": setting.families,
        "faults": len(run.done),
        "probes": sum(len(numbers) for numbers in run.traffic.sent.values()),
        "violated": list(found),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def sums() -> str:
    """All results, a row of a table for each day and commit."""
    rows: dict[tuple[str, str, float], list[dict[str, object]]] = {}
    for text in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        line = json.loads(text)
        rows.setdefault((line["date"], line["commit"], line["seconds"]), []).append(line)
    table = [
        "| date | commit | seeds | seconds each | faults | probes | seeds (by number) with a violation |"
    ]
    table.append("|---|---|---|---|---|---|---|")
    for (date, commit, seconds), lines in rows.items():
        faults, probes = (sum(int(str(line[name])) for line in lines) for name in ("faults", "probes"))
        failed = sorted({int(str(line["seed"])) for line in lines if line["violated"]})
        table.append(
            f"| {date} | {commit} | {len(lines)} | {seconds:g} | {faults:,} | {probes:,} | "
            f"{', '.join(map(str, failed)) or 'none'} |"
        )
    return "\n".join(table)
