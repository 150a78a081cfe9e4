"""Warnings about left-out records: each once while it is one, and of many only the number."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from flanneld_py.daemon import leftout
from flanneld_py.daemon.leftout import PERIOD, SHOWN, LeftOut


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [1_000.0]
    monkeypatch.setattr(leftout, "boottime", lambda: now[0])
    return now


def told(left_out: LeftOut, reasons: dict[str, str], **more: Any) -> list[dict[str, Any]]:
    with capture_logs() as lines:
        left_out.tell(reasons, **more)
    return [dict(line) for line in lines]


def make() -> LeftOut:
    return LeftOut(structlog.get_logger(), "bad_record", "bad_records")


def test_each_once_while_it_is_bad() -> None:
    records = make()
    assert told(records, {"a": "x"}, kept={"a"}) == [
        {"event": "bad_record", "log_level": "warning", "key": "a", "reason": "x", "kept": True}
    ]
    assert told(records, {"a": "another fault"}) == []
    assert [line["key"] for line in told(records, {"b": "y", "a": "x"})] == ["b"]
    assert told(records, {"b": "y"}) == []
    assert [line["key"] for line in told(records, {"b": "y", "a": "x"})] == ["a"], "it was well in between"


def test_of_many_the_first_are_named_and_the_others_counted(clock: list[float]) -> None:
    records = make()
    many = {f"k{number}": "x" for number in range(SHOWN + 50)}
    lines = told(records, many)
    assert [line["event"] for line in lines] == ["bad_record"] * SHOWN + ["bad_records"]
    assert lines[-1]["count"] == 50
    more = many | {"late": "x"}
    assert told(records, more) == [], "the number has just been told"
    clock[0] += PERIOD
    assert [(line["event"], line["count"]) for line in told(records, more)] == [("bad_records", 1)]
    assert [line["key"] for line in told(records, more | {"new": "x"})] == ["new"], "another period"


def test_what_a_stranger_wrote_is_shortened() -> None:
    (line,) = told(make(), {"k" * 5_000: "r" * 5_000})
    assert len(line["key"]) < 400
    assert len(line["reason"]) < 400
