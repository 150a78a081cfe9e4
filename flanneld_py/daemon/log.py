"""Logs: one event a line on stderr; JSON unless a person is looking."""

from __future__ import annotations

import sys

import structlog

DEBUG, INFO = 10, 20


def configure(verbosity: int) -> None:
    """Set up structlog for this process; `verbosity` above 0 adds debug events."""
    on_terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(timestamp_key="ts", sort_keys=False)
        if on_terminal
        else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            _first_things_first,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(DEBUG if verbosity > 0 else INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def _first_things_first(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Time, level, part and event begin each line; the event's own fields follow."""
    head = {name: event.pop(name) for name in ("ts", "level", "part", "event") if name in event}
    return {**head, **event}
