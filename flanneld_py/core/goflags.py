"""Go's flag syntax, rewritten into what click reads, so that flanneld's command lines work unchanged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from flanneld_py.errors import UsageError

_TRUTH = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), "true"),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), "false"),
}
"""What Go's strconv.ParseBool takes."""


def normalise(argv: Sequence[str], booleans: Collection[str]) -> list[str]:
    """Every flag as `--name=value`. As in Go, the first argument that is no flag ends them; the rest is void.

    `-x` is `--x`; `booleans` (names without dashes) take a value only after `=`; `-h` and `-help` become
    `--help`, which ends the list. A flag whose value is missing is left bare for click to complain about.

    Raises:
        UsageError: a value of a boolean is none, or an argument is `-=x` or `---x`.
    """
    return list(_flags(iter(argv), booleans))


def _flags(arguments: Iterator[str], booleans: Collection[str]) -> Iterator[str]:
    for argument in arguments:
        if len(argument) < 2 or not argument.startswith("-") or argument == "--":
            return
        name, equals, value = argument[1:].removeprefix("-").partition("=")
        if not name or name.startswith("-"):
            raise UsageError(f"{argument}: expected a flag such as --iface=eth0")
        if name in ("h", "help"):
            yield "--help"
            return
        if name in booleans:
            yield f"--{name}={_truth(name, value) if equals else 'true'}"
        elif equals:
            yield f"--{name}={value}"
        else:
            following = next(arguments, None)
            yield f"--{name}" if following is None else f"--{name}={following}"


def _truth(name: str, value: str) -> str:
    if value not in _TRUTH:
        raise UsageError(f"--{name}={value}: expected true or false (or 1, t, 0, f)")
    return _TRUTH[value]
