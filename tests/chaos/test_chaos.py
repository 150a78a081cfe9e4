"""Chaos for CI: three seeds of three minutes, and mutants that it must catch.

More by hand: `make chaos SEEDS=50 SECONDS=60`, and all mutants: `make chaos MUTANTS=1`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.__main__ import missed, run_seed
from tests.chaos.faults import CATALOGUE
from tests.chaos.scenarios import FOUND, MUTANTS
from tests.chaos.schedule import make_schedule

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.netns, pytest.mark.chaos]

SECONDS = 180
SEEDS = {"vxlan": 7109, "host-gw": 7110, "udp": 7106}
"""Backend → a seed that chooses it, and many faults."""
IN_CI = (
    "claims-without-guard",
    "shrinks-on-error",
    "never-repairs",
    "ignores-relist",
    "misdelivers",
    "keeps-old-address",
    "writes-at-restart",
    "wrong-subnet-file",
)
"""Mutants; the others are as good as caught when these are, and take ten minutes."""


@pytest.mark.timeout(SECONDS + 420)
@pytest.mark.parametrize("backend", SEEDS)
def test_nothing_takes_it_down(backend: str, figure: Callable[[str], None]) -> None:
    schedule = make_schedule(SEEDS[backend], SECONDS, CATALOGUE)
    assert schedule.setting.backend == backend
    found, text = run_seed(schedule)
    figure(f"chaos, {text.splitlines()[0]}")
    assert not found, text


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", IN_CI)
def test_a_planted_mistake_is_caught(name: str) -> None:
    assert missed(name) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    found, text = run_seed(FOUND[name].schedule, name=name)
    assert not found, text


def test_every_mutant_has_a_scenario() -> None:
    from tests.chaos.mutants import PLANTED  # noqa: PLC0415 - it brings the whole product

    assert PLANTED.keys() == MUTANTS.keys()
    violated = {number for scenario in MUTANTS.values() for number in scenario.violates}
    assert violated == set(range(1, 15)), "each invariant has a mutant that violates it"
