"""Durations as Go writes them, `90s`, `1h30m`, `1.5h` (package time, ParseDuration), and in words."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),  # U+00B5, micro sign
    "μs": Fraction(1, 10**6),  # U+03BC, Greek mu: Go takes both
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}
_PART = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h)"
_WHOLE = re.compile(rf"(?:{_PART})+")
_PARTS = re.compile(r"([0-9.]+)([^0-9.]+)")
_LONGEST = 1 << 63
"""Nanoseconds; Go keeps them in an int64."""
_WORDS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def parse_duration(text: str) -> float:
    """Seconds. Negative ones are not taken: no setting of ours could mean them.

    Raises:
        ValueError: it is no duration; the text says what was expected, without naming the setting.
    """
    unsigned = text.removeprefix("+")
    if unsigned == "0":
        return 0.0
    if len(text) > 100 or _WHOLE.fullmatch(unsigned) is None:
        raise ValueError(
            f"{text[:100]!r}: expected a number with a unit (s, m, h), such as 90s, 30m or 1h30m"
        )
    total = sum(
        Fraction(number if number[-1] != "." else number[:-1]) * _UNITS[unit]
        for number, unit in _PARTS.findall(unsigned)
    )
    if total * 10**9 >= _LONGEST:
        raise ValueError(f"{text!r}: expected a duration below 292 years")
    return float(total)


def duration(seconds: float) -> str:
    """For people, two units at most: `23 h 59 min`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for size, unit in _WORDS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"
