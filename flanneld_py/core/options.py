"""Typed reading of a backend's options, the keys of `Backend` besides `Type`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flanneld_py.addresses import Family
from flanneld_py.core import gojson
from flanneld_py.errors import ConfigError

Choice = TypeVar("Choice", bound=str | bool | int)

HIGHEST_MTU = 65_535


def integer(options: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """The option `key` (as documented, such as `VNI`); absent and null are the default.

    Raises:
        ConfigError: not a whole number from `low` to `high`.
    """
    value = _given(options, key)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise _wrong(key, value, f"a whole number from {low} to {high}, without quotes")
    return value


def boolean(options: Mapping[str, Any], key: str, default: bool) -> bool:
    """The option `key`; absent and null are the default.

    Raises:
        ConfigError: neither true nor false.
    """
    value = _given(options, key)
    if value is None:
        return default
    if type(value) is not bool:
        raise _wrong(key, value, "true or false, without quotes")
    return value


def one_of(options: Mapping[str, Any], key: str, default: Choice, choices: Sequence[Choice]) -> Choice:
    """The option `key`, equal to one of `choices` in type and value; absent and null are the default.

    Raises:
        ConfigError: something else.
    """
    value = _given(options, key)
    if value is None:
        return default
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise _wrong(key, value, "one of " + ", ".join(gojson.show(choice) for choice in choices))


def mtu(options: Mapping[str, Any], families: Iterable[Family], lowest_of: Mapping[Family, int]) -> int:
    """The option `MTU`, bytes on the external interface; 0: not given, take the interface's own.

    `lowest_of`: what each family needs there.

    Raises:
        ConfigError: no whole number, or too small for a family in use.
    """
    lowest = max(lowest_of[family] for family in families)
    value = integer(options, "MTU", 0, 0, HIGHEST_MTU)
    if 0 < value < lowest:
        raise _wrong("MTU", value, f"{lowest} to {HIGHEST_MTU}, or 0 for the interface's own")
    return value


def unknown(options: Mapping[str, Any], known: Iterable[str]) -> dict[str, str]:
    """Option keys (lower case) that none of the `known` names matches → the nearest of these, or empty."""
    names = {name.lower(): name for name in known}
    found = {}
    for key in options:
        if key not in names:
            nearest = difflib.get_close_matches(key[:64], names, n=1)
            found[key] = names[nearest[0]] if nearest else ""
    return found


def _given(options: Mapping[str, Any], key: str) -> Any:
    return options.get(key.lower())


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"Backend.{key} {gojson.show(value)}: expected {expected}; correct or remove it")
