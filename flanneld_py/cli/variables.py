"""Environment variables that look like ours, and that nobody reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from flanneld_py.cli.flagtable import FLAGS

PREFIX = "FLANNELD_"
ENV_FILE = f"{PREFIX}ENV_FILE"
"""flannelctl's own."""
KNOWN = frozenset({flag.variable for flag in FLAGS.values() if flag.variable} | {ENV_FILE})
HARMLESS = frozenset({f"{PREFIX}VERSION", f"{PREFIX}HELP"})
"""What containers and wrappers set for themselves."""


def misspelt(names: Iterable[str]) -> Iterator[str]:
    """A line for each name that begins like a variable of ours and is none, with the nearest that is.

    Never its value, which may be a password.
    """
    # What all have in common would make all of them near.
    rest = sorted(name.removeprefix(PREFIX) for name in KNOWN)
    for name in sorted(names):
        if name.startswith(PREFIX) and name not in KNOWN | HARMLESS:
            nearest = difflib.get_close_matches(name.removeprefix(PREFIX)[:64], rest, n=1)
            hint = f"did you mean {PREFIX}{nearest[0]}?" if nearest else "flanneld-py --help lists all"
            yield f"{name} is no variable of flanneld-py, and is ignored; {hint}"
