"""One op for a driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flanneld_py.model import Op

if TYPE_CHECKING:
    from flanneld_py.drivers.base import Driver


def outcome(driver: Driver, verb: Any, table: Any, key: object, value: object = None) -> str | None:
    (only,) = driver.apply([Op(verb, table, key, value)])
    return only.error
