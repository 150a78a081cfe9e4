"""The lease protocol, exhaustively: every history of few hosts, with the daemon's own decisions and guards.

At every state: never two live owners of overlapping subnets; nothing but a fault takes from a host what it
holds; nobody writes over another's record; who has seen all there is believes only what is so. From every
state, once there are no more faults, all come to a lease, and no record is left that nobody uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.model import scenarios
from tests.unit.model.explorer import explore
from tests.unit.model.scenarios import ALL_FAULTS, clones, hosts

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.model.world import Scenario

EXPLORED = (
    hosts(3, 3),
    hosts(3, 2),
    hosts(2, 1, 1, *ALL_FAULTS),
    hosts(2, 2, 1, *ALL_FAULTS),
    hosts(2, 2, 1, *ALL_FAULTS, on_loss="hold"),
    hosts(2, 2, 2, "kill"),
    hosts(1, 2, 2, *ALL_FAULTS),
    clones(1, "kill", "starve", "forget"),
    scenarios.FIXED,
    scenarios.ONE_ADDRESS,
    scenarios.HALVES,
    scenarios.TWO_FAMILIES,
    scenarios.MOVED,
)


@pytest.mark.parametrize("scenario", EXPLORED, ids=lambda scenario: scenario.name)
def test_every_history(scenario: Scenario, figure: Callable[[str], None]) -> None:
    found = explore(scenario)
    assert not found.wrong, str(found)
    assert found.complete
    figure(f"lease protocol, {found}")
