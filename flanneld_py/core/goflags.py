"""Go's flag syntax, rewritten into what click reads, so that flanneld's command lines work unchanged."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from flanneld_py.errors import UsageError

TRUTH = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
"""What Go's strconv.ParseBool takes."""
_DECIMAL = re.compile(r"[+-]?(0|[1-9](_?[0-9])*)")
_OCTAL = re.compile(r"[+-]?0(_?[0-7])+")
_PREFIXED = re.compile(r"[+-]?0([xX](_?[0-9a-fA-F])+|[oO](_?[0-7])+|[bB](_?[01])+)")


class Arguments(NamedTuple):
    """A command line, taken apart."""

    flags: list[str]
    """Each as `--name=value`; `--help` ends them."""
    ignored: list[str]
    """From the first argument that is no flag on."""


def normalise(argv: Sequence[str], known: Collection[str], booleans: Collection[str]) -> Arguments:
    """Every flag as `--name=value`. As in Go, the first argument that is no flag ends them; the rest is void.

    `-x` is `--x`; `-h` and `-help` become `--help`, which ends the list.

    Args:
        argv: the arguments, without the program's name.
        known: names without dashes.
        booleans: those of them that take a value only after `=`.

    Raises:
        UsageError: a flag is unknown or lacks its value, or an argument is `-=x` or `---x`.
    """
    flags: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest[0]
        if argument == "--":
            rest.pop(0)
            break
        if len(argument) < 2 or not argument.startswith("-"):
            break
        rest.pop(0)
        name, equals, value = argument[1:].removeprefix("-").partition("=")
        if not name or name.startswith("-"):
            raise UsageError(f"{argument}: expected a flag such as --iface=eth0")
        if name in ("h", "help"):
            return Arguments([*flags, "--help"], [])
        if name not in known:
            raise UsageError(f"--{name}: there is no such flag{_nearest(name, known)}; --help lists all")
        if not equals:
            value = "true" if name in booleans else _take(name, rest)
        flags.append(f"--{name}={value}")
    return Arguments(flags, rest)


def parse_integer(text: str) -> int:
    """A whole number in any of Go's spellings: `10`, `-5`, `0x1f`, `0o17`, `017`, `0b11`, `1_000`.

    Raises:
        ValueError: it is none.
    """
    if _OCTAL.fullmatch(text):
        return int(text, 8)
    if _DECIMAL.fullmatch(text) or _PREFIXED.fullmatch(text):
        return int(text, 0)
    raise ValueError(f"{text!r} is no whole number")


def _take(name: str, rest: list[str]) -> str:
    if not rest:
        raise UsageError(f"--{name}: expected a value after it")
    return rest.pop(0)


def _nearest(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name[:64], known, n=1)
    return f" (did you mean --{found[0]}?)" if found else ""
