"""`python -m tests.chaos --seed 7 --seconds 60`: one run, or many after each other."""

from __future__ import annotations

import argparse
import math
import random
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from tests.chaos import engine, report
from tests.chaos.faults import CATALOGUE
from tests.chaos.invariants import violations
from tests.chaos.scenarios import FOUND, MUTANTS
from tests.chaos.schedule import BACKENDS, FAMILIES, Schedule, make_schedule

MUTANT_PATIENCE = 12.0
"""Seconds in which all is to be well again, which it will not be."""

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.recording import Recording
    from tests.chaos.world import World


def run_seed(
    schedule: Schedule, *, options: str = "", name: str = "", verbose: bool = False
) -> tuple[dict[str, list[str]], str]:
    """Carry a schedule out: what is violated, and the summary, with a line that replays it.

    Args:
        schedule: what is to happen.
        options: with which it was chosen, besides seed and seconds.
        name: of a scenario.
        verbose: print each fault.
    """
    found: dict[str, list[str]] = {}
    texts: list[str] = []

    def check(world: World, run: Recording) -> None:
        found.update(violations(run))
        text = report.summary(run, found)
        if found:
            text += f"\nreplay: {report.replay_command(schedule, options, name)}"
        directory = report.write_files(world, run, text)
        texts.append(f"{text}\nall about it: {directory}" if found else text)
        if not options and not name:
            report.note_result(run, found)

    engine.run(schedule, check, tell=tell if verbose else lambda _: None)
    return found, texts[0]


def tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def missed(name: str) -> list[str]:
    """Run the scenario of a mutant; the invariants that should have been violated and were not."""
    scenario, found = MUTANTS[name], list[str]()

    def check(world: World, run: Recording) -> None:
        violated = violations(run)
        report.write_files(world, run, report.summary(run, violated))
        found.extend(violated)

    engine.run(scenario.schedule, check, mutant=name, later=scenario.later, patience=MUTANT_PATIENCE)
    numbers = {int(name.split()[0]) for name in found}
    return [str(number) for number in scenario.violates if number not in numbers]


def run_mutants(names: list[str]) -> int:
    escaped = 0
    for name in names:
        not_seen = missed(name)
        escaped += bool(not_seen)
        tell(f"mutant {name}: " + (f"ESCAPED invariant {', '.join(not_seen)}" if not_seen else "caught"))
    return 1 if escaped else 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{message.removeprefix('argument ')}\n")


def whole(name: str, least: int) -> Callable[[str], int]:
    """The type of a number that make knows by this name."""

    def parsed(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{name} is {text!r}, expected a whole number from {least} on")
        return int(text)

    return parsed


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"SECONDS is {text!r}, expected a number above 0")
    return number


def faults(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CATALOGUE:
            raise argparse.ArgumentTypeError(f"no fault {name!r}, expected some of {', '.join(CATALOGUE)}")
    return names


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=whole("SEED", 0), help="of the first run; a random one when not given")
    parser.add_argument(
        "--seeds", type=whole("SEEDS", 1), default=1, help="how many runs, each with the next seed"
    )
    parser.add_argument("--seconds", type=seconds, default=60.0, help="of faults in each run")
    parser.add_argument("--backend", choices=BACKENDS, default="", help="instead of the seed's choice")
    parser.add_argument("--families", choices=FAMILIES, default="", help="instead of the seed's choice")
    parser.add_argument(
        "--ttl", type=whole("TTL", 0), default=0, help="of leases, instead of the seed's choice"
    )
    parser.add_argument("--only", type=faults, default=[], help="faults to be used, with commas between them")
    parser.add_argument("--scenario", choices=FOUND, help="a run that found something, instead of a seed")
    parser.add_argument("--mutants", action="store_true", help="a short run for each planted mistake")
    parser.add_argument("--mutant", choices=MUTANTS, help="the same for one of them")
    parser.add_argument("--show", action="store_true", help="only print the schedule")
    parser.add_argument("--quiet", action="store_true", help="no line for each fault")
    return parser.parse_args(argv)


def chosen(given: argparse.Namespace) -> str:
    """The options that decide what a seed would."""
    values = {name: getattr(given, name) for name in ("backend", "families", "ttl")}
    values["only"] = ",".join(given.only)
    return "".join(f" --{name}={str(value)!r}" for name, value in values.items() if value)


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Once: what a run has set up is then cleared away undisturbed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    given = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        return carry_out(given)
    except KeyboardInterrupt:
        return INTERRUPTED


def carry_out(given: argparse.Namespace) -> int:
    if given.mutants or given.mutant:
        return run_mutants([given.mutant] if given.mutant else list(MUTANTS))
    if given.scenario:
        schedule = FOUND[given.scenario].schedule
        return 1 if told(schedule, name=given.scenario, verbose=not given.quiet) else 0
    first = random.randrange(1 << 20) if given.seed is None else given.seed
    failed = 0
    for seed in range(first, first + given.seeds):
        try:
            schedule = make_schedule(
                seed,
                given.seconds,
                CATALOGUE,
                backend=given.backend,
                families=given.families,
                ttl=given.ttl,
                only=given.only,
            )
        except ValueError as error:
            print(f"--only: {error}", file=sys.stderr)  # noqa: T201
            return 2
        if given.show:
            tell("\n".join(map(str, schedule.steps)))
            continue
        failed += told(schedule, options=chosen(given), verbose=not given.quiet)
    if given.seeds > 1:
        tell(f"{given.seeds} seeds, {failed} with a violation\n\n{report.sums()}")
    return 1 if failed else 0


def told(schedule: Schedule, *, options: str = "", name: str = "", verbose: bool) -> bool:
    """Carry a schedule out and tell of it; whether anything is violated."""
    tell(report.heading(schedule))
    try:
        found, text = run_seed(schedule, options=options, name=name, verbose=verbose)
    except KeyboardInterrupt:
        tell(f"interrupted; replay: {report.replay_command(schedule, options, name)}")
        raise
    tell(text)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
