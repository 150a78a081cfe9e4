"""Free subnets of a range, checked by enumeration."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address, ip_network
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import IPNetwork
from flanneld_py.core.freesubnets import count_free, random_free
from flanneld_py.model import SubnetRange
from tests.unit.strategies import by_enumeration, networks_near, subnet_ranges, thorough, usual


class Fixed(Random):
    """Picks what it is told to."""

    def __init__(self, pick: int) -> None:
        super().__init__()
        self.pick = pick
        self.among = 0

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:  # noqa: ARG002 - as in Random
        self.among = start
        return self.pick


@st.composite
def half_taken(draw: st.DrawFn) -> tuple[SubnetRange, list[IPNetwork]]:
    allowed = draw(subnet_ranges())
    return allowed, draw(st.lists(networks_near(allowed), max_size=6))


@thorough
@given(half_taken())
def test_every_free_subnet_and_no_other_has_its_own_number(
    world: tuple[SubnetRange, list[IPNetwork]],
) -> None:
    # A draw of a uniform number is thereby uniform over all of the range.
    allowed, taken = world
    free = by_enumeration(allowed, taken)
    assert count_free(allowed, taken) == len(free)
    for number, expected in enumerate(free):
        fixed = Fixed(number)
        assert random_free(allowed, taken, fixed) == expected
        assert fixed.among == len(free)
    if not free:
        assert random_free(allowed, taken, Random(1)) is None


@usual
@given(half_taken(), st.randoms(use_true_random=False))
def test_order_doubles_and_the_other_family_do_not_matter(
    world: tuple[SubnetRange, list[IPNetwork]], random: Random
) -> None:
    allowed, taken = world
    other = ip_network("fd00::/8" if allowed.network.version == 4 else "0.0.0.0/0")
    shuffled = random.sample(taken, len(taken)) + taken[:2] + [other]
    assert random_free(allowed, shuffled, Random(7)) == random_free(allowed, taken, Random(7))


def test_uniform_over_the_whole_range_not_its_lowest_hundred() -> None:
    allowed = SubnetRange(IPv4Network("10.0.0.0/8"), 24, ip_address("10.0.1.0"), ip_address("10.255.255.0"))
    taken: list[IPNetwork] = [ip_network("10.64.0.0/10")]
    random, sixteenths = Random(4711), [0] * 16
    for _ in range(12_000):
        found = random_free(allowed, taken, random)
        assert found is not None
        sixteenths[int(found.network_address) >> 20 & 15] += 1
    assert sixteenths[4:8] == [0, 0, 0, 0]
    # 1000 expected in each of the twelve, with a standard deviation of 30.
    assert all(850 < count < 1150 for count in sixteenths[:4] + sixteenths[8:])
