"""Values of which not every field counts when two are compared."""

from __future__ import annotations

from flanneld_py.daemon import inbox
from flanneld_py.values import PartlyCompared


class Sighting(PartlyCompared, frozen=True):
    compared = 2

    name: str
    place: str
    since: int = 0


class Other(PartlyCompared, frozen=True):
    compared = 2

    name: str
    place: str
    since: int = 0


def test_what_does_not_count_makes_no_difference() -> None:
    assert Sighting("a", "b", 1) == Sighting("a", "b", 2)
    assert {Sighting("a", "b", 1)} == {Sighting("a", "b", 2)}


def test_what_counts_does() -> None:
    assert Sighting("a", "b") != Sighting("a", "c")
    assert Sighting("a", "b") != Other("a", "b")
    assert Sighting("a", "b") != ("a", "b")


def test_each_says_how_much_of_it_counts() -> None:
    product = inbox.__name__.partition(".")[0]
    kinds = {kind for kind in PartlyCompared.__subclasses__() if kind.__module__.startswith(product)}
    assert kinds
    for kind in kinds:
        assert 0 < kind.compared < len(kind.__struct_fields__), kind
