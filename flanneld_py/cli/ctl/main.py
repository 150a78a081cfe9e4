"""The entry point of flannelctl: a Ctrl-C while the rest of it is imported ends it as one later does."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Ends the process."""
    try:
        from flanneld_py.cli.ctl.commands import run  # noqa: PLC0415 - it takes a while

        code = run(sys.argv[1:])
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except (BrokenPipeError, SystemExit):
        # Whoever read our output, such as `head`, has seen enough; click makes that a SystemExit.
        code = 1
    # gRPC's own clean-up can wait for a server that hangs; nothing of ours is left to do.
    os._exit(code)


if __name__ == "__main__":
    main()
