"""JSON as Go's encoding/json reads it, where Python's `json` differs.

Go nodes read the same keys of the registry, so both must take the same documents for good: object keys
match fields case-insensitively, a repeated key is read each time it occurs and the last one wins, `24.0`
is no integer, and NaN, byte order marks and UTF-16 are no JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 64
"""Nesting beyond this is refused: comparing or writing such a value could exhaust the stack later."""
_LONGEST_INT = 20
"""Digits of 2^64 - 1; Go's integers end there too."""


class _Repeating(dict[str, Any]):
    """An object in which a key occurs more than once; as a dict, the last one wins."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Repeating(pairs)


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= _LONGEST_INT else float(text)


def _constant(text: str) -> None:
    raise ValueError(f"not JSON: it contains {text}")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)


def load(data: str | bytes) -> Any:
    """The document as dicts, lists and scalars; integers beyond 64 bits become floats.

    Raises:
        ValueError: why it is no acceptable JSON, in one line that continues "the value is …".
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data.encode().decode()
    except UnicodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from None
    try:
        document = _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper_than(document, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if "\\u" in text:
        _refuse_lone_surrogates(document)
    return document


def _deeper_than(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit + 1):
        containers = [node for node in level if isinstance(node, dict | list)]
        if not containers:
            return False
        level = [
            child for node in containers for child in (node.values() if isinstance(node, dict) else node)
        ]
    return True


def _refuse_lone_surrogates(document: Any) -> None:
    """Text with half a UTF-16 pair could be stored here but not be printed later."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("not JSON text: a \\u escape stands for half a character") from None


def members(document: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Key and value in the order written, repeated keys repeatedly."""
    return document.pairs if isinstance(document, _Repeating) else document.items()


def show(value: Any) -> str:
    """A JSON value for an error message: one line of printable ASCII, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
