"""Values of which not every field says what they are."""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct
from msgspec.structs import astuple


class PartlyCompared(Struct, frozen=True):
    """A Struct with fields that do not count when two are compared."""

    uncompared: ClassVar[int]
    """How many they are. They come last."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self is other or self._compared == other._compared

    def __hash__(self) -> int:
        return hash(self._compared)

    @property
    def _compared(self) -> tuple[object, ...]:
        return astuple(self)[: len(self.__struct_fields__) - self.uncompared]
