"""Python does not look for garbage among ten thousand records that all stay; afterwards it does as usual."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from flanneld_py.daemon import garbage


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_a_start_with_many_records_is_not_looked_through() -> None:
    gc.set_threshold(garbage.STARTING, 10, 10)
    garbage.expect(3)
    assert gc.get_threshold()[0] == garbage.STARTING
    garbage.expect(10_000)
    assert gc.get_threshold()[0] == 1_000_000
    garbage.settle()
    assert gc.get_threshold()[0] == garbage.SETTLED
    garbage.expect(10_000)
    assert gc.get_threshold()[0] == garbage.SETTLED
