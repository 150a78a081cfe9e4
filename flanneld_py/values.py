"""Values of which not every field says what they are."""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct
from msgspec.structs import astuple


class PartlyCompared(Struct, frozen=True):
    """A Struct with fields that do not count when two are compared."""

    compared: ClassVar[int]
    """How many do count. They come first."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        count = self.compared
        return self is other or astuple(self)[:count] == astuple(other)[:count]

    def __hash__(self) -> int:
        return hash(astuple(self)[: self.compared])
