"""A table that shares what is the same is the table that a copy would be."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core import layered
from flanneld_py.core.layered import Layered, changed, flat

KEYS = st.integers(0, 12)
TABLES = st.dictionaries(KEYS, st.integers(0, 2))
CHANGES = st.lists(st.tuples(st.sets(KEYS), TABLES), max_size=8)


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layered, "SMALL", 3)
    monkeypatch.setattr(layered, "MANY", 9)


@given(TABLES, CHANGES)
def test_after_any_changes_it_is_what_a_copy_is(
    first: dict[int, int], changes: list[tuple[set[int], dict[int, int]]]
) -> None:
    table: Mapping[int, int] = first
    copy, untouched = dict(first), dict(first)
    for keys, coming in changes:
        last, last_copy = table, dict(copy)
        leaving = keys & copy.keys()
        table = changed(table, leaving, coming)
        copy = {key: value for key, value in copy.items() if key not in leaving} | coming
        assert table == copy
        assert copy == table
        assert (table == last) is (last == table) is (copy == last_copy)
        assert dict(table) == flat(table) == copy
        assert len(table) == len(list(table)) == len(copy)
        assert all(table.get(key, "none") == copy.get(key, "none") for key in range(13))
        assert last == last_copy
    assert first == untouched


def test_what_is_the_same_is_shared() -> None:
    first = dict.fromkeys(range(5), "there")
    once = changed(first, [3], {7: "new"})
    twice = changed(once, [7], {1: "other"})
    assert isinstance(once, Layered)
    assert isinstance(twice, Layered)
    assert once.base is twice.base is first
    assert twice == {0: "there", 1: "other", 2: "there", 4: "there"}


def test_small_tables_and_large_differences_are_copied() -> None:
    assert type(changed({1: "a"}, [], {2: "b"})) is dict
    assert type(changed(dict.fromkeys(range(20), "a"), range(5), dict.fromkeys(range(30, 36), "b"))) is dict


def test_it_is_compared_with_tables_only() -> None:
    assert Layered({1: "a"}, frozenset(), {}) != [1]
