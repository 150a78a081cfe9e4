"""What is explored: few hosts, few subnets, and the faults that meet in one history."""

from __future__ import annotations

from flanneld_py.model import NetworkConfig
from tests.unit import strategies
from tests.unit.model.world import Scenario

ALL_FAULTS = ("kill", "forget", "starve", "lose", "late", "lag", "delete")


def _one_family(subnets: str) -> NetworkConfig:
    return strategies.config("host-gw", subnets=int(subnets))


def _halves(what: str) -> NetworkConfig:
    """Two subnets; after the change of the config, the four halves of them."""
    return strategies.config("host-gw", subnets=2, halves=what == "halves")


def _two_families(subnets: str) -> NetworkConfig:
    return strategies.config("host-gw", families=(4, 6), subnets=int(subnets))


def hosts(count: int, subnets: int, at_most: int = 0, *faults: str, on_loss: str = "renumber") -> Scenario:
    """Hosts that differ in nothing but their names and addresses."""
    met = f"{at_most} of: {', '.join(faults)}" if faults else "no faults"
    return Scenario(
        f"{count} hosts, {subnets} subnets, {on_loss}, {met}",
        count,
        (str(subnets),),
        _one_family,
        dict.fromkeys(faults, 1 if len(faults) > 1 else at_most),
        at_most=at_most,
        on_loss=on_loss,
        served=min(count, subnets),
    )


def clones(at_most: int = 0, *faults: str) -> Scenario:
    """Two machines of one image."""
    return Scenario(
        f"2 clones, {at_most} of: {', '.join(faults)}",
        2,
        ("2",),
        _one_family,
        dict.fromkeys(faults, at_most),
        at_most=at_most,
        node_ids=("node", "node"),
    )


FIXED = Scenario(
    "one node id given to 2 hosts",
    2,
    ("2",),
    _one_family,
    {"kill": 1},
    1,
    ("n", "n"),
    fixed_id=True,
    served=1,
)
ONE_ADDRESS = Scenario(
    "one address, 2 hosts", 2, ("2",), _one_family, {"kill": 1}, 1, ("a", "b"), (1, 1), served=1
)
HALVES = Scenario("2 hosts, subnets become half as long", 2, ("whole", "halves"), _halves)
TWO_FAMILIES = Scenario("2 hosts, both families", 2, ("2",), _two_families)
MOVED = Scenario(
    "2 hosts, both families, one gets another address", 2, ("2",), _two_families, {"address": 1, "kill": 1}, 1
)
