"""`python -m flanneld_py.lab demo` and `… bench`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType

from flanneld_py.lab.bench import bench
from flanneld_py.lab.cnibench import BRIDGE
from flanneld_py.lab.demo import EXIT_FAILED, EXIT_IMPOSSIBLE, EXIT_WELL, demo
from flanneld_py.lab.overlays import OVERLAYS
from flanneld_py.lab.requirements import obstacle
from flanneld_py.lab.waiting import LabError

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
    commands.add_parser("bench", help="what each backend costs against plain routes; needs root")
    return parser


def main() -> int:
    """The exit code: 0 all well, 1 something failed, 2 it cannot run here."""
    arguments = _parser().parse_args()
    for number in _STOPPING:
        signal.signal(number, _stop)
    try:
        if arguments.command == "demo":
            return demo(arguments.backend or list(OVERLAYS))
        if reason := obstacle(
            ["iperf3", str(BRIDGE)], [overlay.link for overlay in OVERLAYS.values() if overlay.link]
        ):
            print(f"The bench cannot run here: {reason}")
            return EXIT_IMPOSSIBLE
        bench()
        return EXIT_WELL
    except LabError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # Nobody reads on; the interpreter's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
