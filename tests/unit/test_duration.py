"""Durations as Go writes them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.duration import duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("5s", 5),
        ("+5s", 5),
        ("90m", 5400),
        ("1h30m", 5400),
        ("24h0m0s", 86_400),
        ("1.5h", 5400),
        ("1.h", 3600),
        (".5s", 0.5),
        ("1500ms", 1.5),
        ("2us", 2e-6),
        ("2µs", 2e-6),
        ("2\u03bcs", 2e-6),
        ("3ns", 3e-9),
        ("1m1m", 120),
    ],
)
def test_taken_as_go_takes_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "5", "-5s", "s", "5 s", "1d", "5S", ".s", "1..5s", "h1", "++1s", "1h 30m", "٣s", "9" * 200 + "s"],
)
def test_everything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a number with a unit .*1h30m"):
        parse_duration(text)


def test_more_than_go_can_hold_is_refused() -> None:
    assert parse_duration("2562047h") > 0
    with pytest.raises(ValueError, match="below 292 years"):
        parse_duration("2562048h")


@given(st.integers(0, 1000), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_parts_add_up(hours: int, minutes: int, seconds: int, millis: int) -> None:
    whole = parse_duration(f"{hours}h{minutes}m{seconds}.{millis:03}s")
    assert whole == pytest.approx(hours * 3600 + minutes * 60 + seconds + millis / 1000)


@given(st.text())
def test_any_text_is_a_number_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert parse_duration(text) >= 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3_600 + 5, "1 h"),
        (86_399, "23 h 59 min"),
        (86_400 * 400 + 3_600, "400 d 1 h"),
    ],
)
def test_in_words_of_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words
