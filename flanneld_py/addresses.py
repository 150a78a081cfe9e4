"""Addresses and networks of either family, and what there is of each family: under all other values."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Generic, Literal, TypeAlias, TypeVar

from msgspec import Struct

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network
IPInterface: TypeAlias = IPv4Interface | IPv6Interface
Family: TypeAlias = Literal[4, 6]
FAMILIES: tuple[Family, Family] = (4, 6)

T = TypeVar("T")


class PerFamily(Struct, Generic[T], frozen=True):
    """One value for IPv4, one for IPv6; `None` where a family is not in use."""

    v4: T | None = None
    v6: T | None = None

    def get(self, family: Family) -> T | None:
        return self.v4 if family == 4 else self.v6

    def items(self) -> Iterator[tuple[Family, T]]:
        """The families in use with their values, IPv4 first."""
        if self.v4 is not None:
            yield 4, self.v4
        if self.v6 is not None:
            yield 6, self.v6

    def values(self) -> tuple[T, ...]:
        return (self.v4,) if self.v4 is not None and self.v6 is None else tuple([v for _, v in self.items()])


Subnets: TypeAlias = PerFamily[IPNetwork]
