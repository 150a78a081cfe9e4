"""Dual-stack and IPv6-only leases: overlap in any family counts, and a change of families keeps the rest."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import Family, IPNetwork, PerFamily, Subnets
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.leasedecision import Claim, Conflict, Decision, Keep, Move, Release, Wait, Wish
from flanneld_py.model import NetworkConfig, Record, Snapshot
from tests.unit import strategies
from tests.unit.leasing import wish
from tests.unit.strategies import by_enumeration, host, per_family, snapshot_of, subnet, thorough

BOTH: tuple[Family, ...] = (4, 6)
DUAL = strategies.config(families=BOTH)
V6_ONLY = strategies.config(families=(6,))


def lease(subnets: Subnets, holder: int, age: int = 5, **more: Any) -> Record:
    """As the host of that number would have written it."""
    families = tuple(family for family, _ in subnets.items())
    made = wish(holder, families).record(subnets, f"node-{holder}")
    return replace(made, **{"create_revision": age, "mod_revision": age, "etcd_lease": 7, **more})


def both(v4: int, v6: int) -> Subnets:
    return PerFamily(subnet(4, v4), subnet(6, v6))


def decide(
    *records: Record,
    config: NetworkConfig = DUAL,
    by: Wish | None = None,
    families: tuple[Family, ...] = BOTH,
    **more: Any,
) -> Decision:
    asked = by or wish(1, families)
    return decide_lease(config, snapshot_of(records), host(1, families, **more), asked, Random(1))


def test_an_ipv6_only_lease_has_the_key_that_flannel_would_give_it() -> None:
    claim = decide(config=V6_ONLY, families=(6,))
    assert isinstance(claim, Claim)
    assert claim.wanted.subnets.v4 is None
    assert claim.wanted.key == f"0.0.0.0-0&{claim.wanted.subnets.v6}".replace("/", "-")
    assert (claim.wanted.public_ips.v4, claim.wanted.public_ips.v6) == (None, ip_address("2001:db8::1"))


def test_s6_two_ipv6_only_hosts_do_not_share_a_lease_though_both_publish_0_0_0_0() -> None:
    theirs = lease(PerFamily(None, subnet(6, 3)), 2)
    claim = decide(theirs, config=V6_ONLY, families=(6,))
    assert isinstance(claim, Claim)
    assert claim.wanted.subnets.v6 != subnet(6, 3)
    mine = replace(claim.wanted, create_revision=9, mod_revision=9, etcd_lease=8)
    assert decide(theirs, mine, config=V6_ONLY, families=(6,)) == Keep(mine)


def test_s10_half_a_subnet_in_common_is_an_overlap() -> None:
    older = lease(both(3, 3), 2, age=4)
    for mine in (lease(both(3, 9), 1), lease(both(9, 3), 1)):
        found = decide(older, mine)
        assert isinstance(found, Release)
        assert "overlaps the older lease 10.5.3.0-24&fd00:5:0:3::-64" in found.reason


def test_s10_what_another_has_half_of_is_not_claimed_again() -> None:
    older = lease(both(3, 3), 2)
    claim = decide(older, by=wish(1, BOTH, previous=(both(3, 9),)))
    assert isinstance(claim, Claim)
    assert claim.wanted.subnets.v4 != subnet(4, 3)
    assert claim.wanted.subnets.v6 == subnet(6, 9), "the free half of the old lease is kept"


def test_s17_with_ipv6_switched_on_the_ipv4_subnet_stays_and_the_record_moves_in_one_step() -> None:
    mine, others = lease(PerFamily(subnet(4, 3)), 1), [lease(PerFamily(subnet(4, n)), n) for n in (4, 5)]
    found = decide(mine, *others)
    assert isinstance(found, Move)
    assert found.record == mine
    assert found.wanted.subnets.v4 == subnet(4, 3)
    assert found.wanted.subnets.v6 in by_enumeration(DUAL.ranges.v6, [])  # type: ignore[arg-type]
    assert found.wanted.key.startswith("10.5.3.0-24&fd00:5:0:")


def test_s17_with_the_record_gone_too() -> None:
    claim = decide(by=wish(1, BOTH, previous=(PerFamily(subnet(4, 3)),)))
    assert isinstance(claim, Claim)
    assert claim.wanted.subnets.v4 == subnet(4, 3)
    assert claim.wanted.subnets.v6 is not None


def test_the_ipv6_subnet_of_an_earlier_time_is_taken_up_again() -> None:
    mine = lease(PerFamily(subnet(4, 3)), 1)
    dual = wish(1, BOTH, previous=(mine.subnets, both(3, 88)))
    claim = decide(by=dual)
    assert isinstance(claim, Claim)
    assert claim.wanted.subnets == both(3, 88)


def test_with_ipv6_switched_off_the_ipv4_subnet_stays() -> None:
    mine = lease(both(3, 9), 1)
    found = decide(mine, config=strategies.config())
    assert isinstance(found, Move)
    assert found.wanted.key == "10.5.3.0-24"
    assert (found.wanted.public_ips.v6, found.wanted.backend_data.v6) == (None, None)


def test_another_ipv6_network_costs_the_ipv4_subnet_nothing() -> None:
    mine = lease(PerFamily(subnet(4, 3), ip_network("fd00:9:0:1::/64")), 1)
    found = decide(mine)
    assert isinstance(found, Move)
    assert found.wanted.subnets.v4 == subnet(4, 3)


def test_a_subnet_that_another_has_by_now_is_not_moved_along() -> None:
    mine, theirs = lease(PerFamily(subnet(4, 3)), 1), lease(both(3, 9), 2)
    found = decide(mine, theirs)
    assert isinstance(found, Move)
    assert found.wanted.subnets.v4 != subnet(4, 3)
    reserved = replace(mine, etcd_lease=0)
    assert isinstance(decide(reserved, theirs), Conflict), "which of the two goes, is not ours to say"


def test_without_a_free_subnet_of_the_new_family_the_lease_stays_as_it_is() -> None:
    config = strategies.config(families=BOTH, subnets=1)
    mine, theirs = lease(PerFamily(subnet(4, 1)), 1), lease(PerFamily(None, subnet(6, 1)), 2)
    found = decide(mine, theirs, config=config)
    assert isinstance(found, Wait)
    assert "no free subnet: fd00:5::/48" in found.reason


def test_a_second_lease_goes_before_the_first_is_refitted() -> None:
    """Else two hosts with two each could wait for one another."""
    config = strategies.config(families=BOTH, subnets=2)
    first, second = lease(both(1, 9), 1, age=3), lease(PerFamily(subnet(4, 9), subnet(6, 1)), 1, age=4)
    theirs = lease(both(2, 2), 2)
    assert decide(first, second, theirs, config=config) == Release(
        second, f"{second.key} is a second lease of this host beside {first.key}"
    )
    fitting = lease(both(1, 1), 1, age=5)
    assert decide(first, fitting, theirs, config=config) == Release(
        first, f"{first.key} is a second lease of this host beside {fitting.key}"
    )


def test_a_family_without_an_address_is_waited_for() -> None:
    found = decide(by=wish(1, (6,)))
    assert isinstance(found, Wait)
    assert "no IPv4 address" in found.reason


# --- for any registry -----------------------------------------------------------------------------


@st.composite
def crowded(draw: st.DrawFn) -> tuple[NetworkConfig, Snapshot, Wish]:
    """Few subnets, of which others hold some: of one family or both, of other lengths, or unreadable."""
    families: tuple[Family, ...] = draw(strategies.FAMILIES)
    room = draw(st.integers(1, 5))
    records = []
    for holder in range(2, 2 + draw(st.integers(0, 6))):
        found: dict[Family, IPNetwork] = {}
        for family in draw(st.sampled_from(((4,), (6,), (4, 6)))):
            net = subnet(family, draw(st.integers(1, room + 1)))
            shape = draw(st.sampled_from(("same", "same", "half", "double")))
            parts: list[IPNetwork] = [*net.subnets()]
            found[family] = parts[1] if shape == "half" else net.supernet() if shape == "double" else net
        records.append(lease(per_family(found), holder, age=holder))
    seen = snapshot_of(records)
    if draw(st.booleans()):
        seen = replace(seen, bad={"10.5.1.0-24&fd00:5:0:1::-64": "garbage"})
    had = {family: subnet(family, draw(st.integers(1, room))) for family in families}
    previous = draw(st.sampled_from(((), (per_family(had),), (PerFamily(subnet(4, 1)),))))
    return strategies.config(families=families, subnets=room), seen, wish(1, families, previous=previous)


@thorough
@given(crowded(), st.integers(0, 9))
def test_a_claim_overlaps_nothing_and_fails_only_when_a_family_is_full(
    world: tuple[NetworkConfig, Snapshot, Wish], seed: int
) -> None:
    config, seen, asked = world
    here = host(1, config.families)
    found = decide_lease(config, seen, here, asked, Random(seed))
    taken = [net for record in seen.records.values() for net in record.subnets.values()]
    if seen.bad:
        taken += [subnet(4, 1), subnet(6, 1)]
    free = {family: by_enumeration(allowed, taken) for family, allowed in config.ranges.items()}
    if not isinstance(found, Claim):
        assert isinstance(found, Wait)
        assert not all(free.values()), found
        return
    assert {family for family, _ in found.wanted.subnets.items()} == set(config.families)
    for family, chosen in found.wanted.subnets.items():
        assert chosen in free[family]
