"""`python -m flanneld_py.lab demo` and `… bench`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from flanneld_py.lab.bench import ROUNDS, SECONDS, TRIPS, Plan, bench, impossible
from flanneld_py.lab.demo import EXIT_FAILED, EXIT_IMPOSSIBLE, EXIT_WELL, demo
from flanneld_py.lab.overlays import OVERLAYS
from flanneld_py.lab.scale import ScalePlan, impossible_scale, save, scale, tables
from flanneld_py.lab.waiting import LabError

SECTIONS = ("paths", "scale")
RESULTS = Path(__file__).parents[2] / "build" / "bench"
"""Where the figures of section scale are kept, as JSON and as a plot."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _stop(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that the lab cleans up, and let nothing interrupt that."""
    for other in _STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flanneld_py.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="three hosts join an overlay, break, and heal; needs root")
    shown.add_argument(
        "--backend",
        action="append",
        choices=sorted(OVERLAYS),
        help="only this one; may be given several times (default: each in turn)",
    )
    _add_bench(commands.add_parser("bench", help="what it costs, in packets and in hosts; needs root"))
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--section",
        choices=("all", *SECTIONS),
        default="all",
        help="paths: packets by each backend; scale: one daemon among many leases (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=ROUNDS,
        help="how often all is measured, in turn; scale takes seven minutes each (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=SECONDS,
        help="of each TCP stream; UDP half (default: %(default)s)",
    )
    parser.add_argument(
        "--trips", type=_positive, default=TRIPS, help="round trips of each sample (default: %(default)s)"
    )
    parser.add_argument(
        "--peer", type=_path, metavar="PROGRAM", help="measure it too, as flannel's backend udp"
    )
    parser.add_argument("--json", type=_path, metavar="FILE", help="write every sample to it")


def _positive(text: str) -> int:
    if not text.isdecimal() or not (number := int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _path(text: str) -> Path | None:
    """None for an empty one: a variable of make that is not set."""
    return Path(text) if text else None


def _bench(arguments: argparse.Namespace) -> int:
    sections = SECTIONS if arguments.section == "all" else (arguments.section,)
    for section in sections:
        if reason := impossible() if section == "paths" else impossible_scale():
            print(f"The bench cannot run here: {reason}")
            return EXIT_IMPOSSIBLE

    def say(line: str) -> None:
        print(line, flush=True)

    if "paths" in sections:
        plan = Plan(arguments.rounds, arguments.seconds, arguments.trips, arguments.peer)
        bench(plan, say, arguments.json)
    if "scale" in sections:
        measured = scale(ScalePlan(rounds=arguments.rounds, peer=arguments.peer), say)
        for line in (*tables(measured), *map(str, save(measured, RESULTS))):
            say(line)
    return EXIT_WELL


def main() -> int:
    """The exit code: 0 all well, 1 something failed, 2 it cannot run here."""
    arguments = _parser().parse_args()
    for number in _STOPPING:
        signal.signal(number, _stop)
    try:
        if arguments.command == "demo":
            return demo(arguments.backend or list(OVERLAYS))
        return _bench(arguments)
    except LabError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # Nobody reads on; the interpreter's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
