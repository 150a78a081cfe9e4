"""Whether JSON is what we are about to read it as: a file can be damaged in more ways than being no JSON."""

from __future__ import annotations

from typing import Any


def has_shape(value: Any, shape: Any) -> bool:
    """Whether JSON has a shape.

    A shape is a dict (each of its keys is there, with that shape; others may be), a list of one shape (that
    of each item), or a tuple of alternatives: types, shapes, or None for null.
    """
    if isinstance(shape, tuple):
        return any(_is(value, one) for one in shape)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            key in value and has_shape(value[key], inner) for key, inner in shape.items()
        )
    return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)


def _is(value: Any, one: Any) -> bool:
    if one is None:
        return value is None
    if not isinstance(one, type):
        return has_shape(value, one)
    # To Python true is a number, too.
    return isinstance(value, one) and (one is bool or not isinstance(value, bool))
