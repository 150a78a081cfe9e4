"""What a fuzz target is: bytes in, and whatever must not be is an exception."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LONGEST_MESSAGE = 1000
"""Characters of an explanation, whatever it is about."""


class Target(NamedTuple):
    """One kind of input."""

    check: Callable[[bytes], None]
    """Reads it as the product does; raises when something is wrong with what comes of it."""
    seeds: Callable[[], Iterable[bytes]]
    """Inputs to begin with."""
    words: tuple[str, ...] = ()
    """What a fuzzer would hardly find by itself."""
    plugins: tuple[object, ...] = ()
    """Modules under test that are not of the package."""


def one_line(text: object, *names: str) -> None:
    """An explanation for a person: one line that can be printed and names what it is about.

    `names`: one of these must be in it.
    """
    message = str(text)
    assert message, "an explanation is empty"
    assert message.isprintable(), f"not a line: {message!r}"
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message!r}"
    assert not names or any(name in message for name in names), f"names nothing: {message!r}"
