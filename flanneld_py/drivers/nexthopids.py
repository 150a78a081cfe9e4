"""The ids of nexthop objects: which the kernel has, which of them are ours, and which is given next."""

from __future__ import annotations

from collections.abc import Iterable

from flanneld_py.model import NextHop


class NexthopIds:
    """Those of one etcd prefix, which come from a range of its own.

    Args:
        ids: the range.
    """

    def __init__(self, ids: range) -> None:
        self.range = ids
        self.of: dict[NextHop, list[int]] = {}
        """Mostly one; the first is the one in use."""
        self.known: set[int] = set()
        """That we gave, or saw in use by what is ours."""
        self._taken: set[int] = set()
        self._last = ids.start - 1

    def seen(self, taken: set[int], ours: dict[int, NextHop]) -> None:
        """What the kernel holds now: of the range, and of that what is ours."""
        self._taken, self.known, self.of = taken, set(ours), {}
        for ident, hop in ours.items():
            self.of.setdefault(hop, []).append(ident)

    def is_room(self, count: int) -> bool:
        return len(self._taken) + count <= len(self.range)

    def give(self, hop: NextHop) -> tuple[int, bool]:
        """The id for it, and whether that is new.

        Raises:
            ValueError: there is none left.
        """
        numbers = self.of.setdefault(hop, [])  # to hash a nexthop takes a microsecond
        if numbers:
            return numbers[0], False
        numbers.append(self._free())
        return numbers[0], True

    def forget(self, hops: Iterable[NextHop]) -> None:
        for hop in hops:
            self.known.difference_update(self.of.pop(hop, ()))

    def _free(self) -> int:
        for _ in self.range:
            self._last = self._last + 1 if self._last + 1 in self.range else self.range.start
            if self._last not in self._taken:
                self._taken.add(self._last)
                self.known.add(self._last)
                return self._last
        raise ValueError(f"all {len(self.range)} nexthop ids of this etcd prefix are in use")
