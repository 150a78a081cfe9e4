"""Which subnet a host leases: free ones by enumeration, decisions by rule, and races to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, ip_address, ip_network
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.allocate import (
    Adopt,
    Claim,
    Conflict,
    Decision,
    Keep,
    Release,
    Wait,
    Wish,
    decide_lease,
    find_own,
    random_free,
)
from flanneld_py.core.records import encode, snapshot
from flanneld_py.model import (
    Family,
    Host,
    IPAddress,
    IPNetwork,
    NetworkConfig,
    PerFamily,
    Record,
    Snapshot,
    SubnetRange,
    Subnets,
)
from tests.unit import strategies
from tests.unit.strategies import (
    host,
    listing_of,
    mac,
    networks_near,
    per_family,
    snapshot_of,
    subnet,
    subnet_ranges,
    thorough,
    underlay,
    usual,
)

# --- free subnets ---------------------------------------------------------------------------------


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


def by_enumeration(allowed: SubnetRange, taken: Sequence[IPNetwork]) -> list[IPNetwork]:
    """Every subnet of the range that overlaps nothing, one by one."""
    step = 1 << (allowed.network.max_prefixlen - allowed.subnet_len)
    bases = range(int(allowed.subnet_min), int(allowed.subnet_max) + 1, step)
    kind = type(allowed.network)
    candidates: list[IPNetwork] = [kind((base, allowed.subnet_len)) for base in bases]
    same_family = [net for net in taken if net.version == allowed.network.version]
    return [c for c in candidates if not any(c.overlaps(net) for net in same_family)]


@thorough
@given(half_taken())
def test_every_free_subnet_and_no_other_has_its_own_number(
    world: tuple[SubnetRange, list[IPNetwork]],
) -> None:
    # A draw of a uniform number is thereby uniform over all of the range.
    allowed, taken = world
    free = by_enumeration(allowed, taken)
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


# --- decisions ------------------------------------------------------------------------------------


def wish(number: int, families: Sequence[Family] = (4,), **more: Any) -> Wish:
    """What the host of a number asks for."""
    return Wish(
        backend_type="vxlan",
        public_ips=per_family({family: underlay(family, number) for family in families}),
        backend_data=per_family(
            {family: {"VNI": 1, "VtepMAC": mac(16 * number + family)} for family in families}
        ),
        **more,
    )


def record(number: int, holder: int, **more: Any) -> Record:
    """The lease of a subnet as a host of ours would have written it."""
    made = wish(holder).record(PerFamily(subnet(4, number)), f"node-{holder}")
    return replace(made, **{"create_revision": number, "mod_revision": number, "etcd_lease": 7, **more})


def decide(
    *records: Record, by: Wish | None = None, config: NetworkConfig | None = None, **more: Any
) -> Decision:
    """What host 1 does about these records."""
    return decide_lease(
        config or strategies.config(), snapshot_of(records), host(1, **more), by or wish(1), Random(1)
    )


CONFIG_T29 = NetworkConfig(
    PerFamily(SubnetRange(IPv4Network("10.3.0.0/16"), 24, ip_address("10.3.1.0"), ip_address("10.3.25.0"))),
    "vxlan",
    {},
)


def t29_records() -> list[Record]:
    taken = [ip_network(f"10.3.{n}.0/24") for n in (1, 2, 4, 5, 31)]
    ip: PerFamily[IPAddress] = PerFamily(ip_address("1.1.1.1"))
    return [
        Record(key=f"10.3.{n.network_address.packed[2]}.0-24", subnets=PerFamily(n), public_ips=ip)
        for n in taken
    ]


@pytest.mark.parametrize("seed", range(50))
def test_t29_a_free_subnet_between_min_and_max(seed: int) -> None:
    found = decide_lease(CONFIG_T29, snapshot_of(t29_records()), host(1), wish(1), Random(seed))
    assert isinstance(found, Claim)
    third = found.wanted.subnets.v4.network_address.packed[2] if found.wanted.subnets.v4 else 0
    assert found.wanted.subnets.v4 == ip_network(f"10.3.{third}.0/24")
    assert third in set(range(1, 26)) - {1, 2, 4, 5}


def test_t30_the_same_node_keeps_its_subnet() -> None:
    first = decide_lease(CONFIG_T29, snapshot_of(t29_records()), host(1), wish(1), Random(1))
    assert isinstance(first, Claim)
    stands = replace(first.wanted, create_revision=50, mod_revision=50, etcd_lease=9)
    again = decide_lease(CONFIG_T29, snapshot_of([*t29_records(), stands]), host(1), wish(1), Random(2))
    assert again == Keep(stands)


def test_t31_a_changed_network_means_release_then_a_subnet_of_the_new_one() -> None:
    old = record(3, 1)
    new = replace(
        CONFIG_T29,
        ranges=PerFamily(
            SubnetRange(IPv4Network("10.4.0.0/16"), 24, ip_address("10.4.1.0"), ip_address("10.4.255.0"))
        ),
    )
    asked = wish(1, previous=(old.subnets,))
    assert decide(old, by=asked, config=new) == Release(old, "10.5.3.0-24 does not fit the network config")
    claim = decide(by=asked, config=new)
    assert isinstance(claim, Claim)
    assert claim.wanted.subnets.v4 is not None
    assert ip_network("10.4.0.0/16").supernet_of(claim.wanted.subnets.v4)  # type: ignore[arg-type]


def test_t33_nothing_changed_is_nothing_to_write() -> None:
    assert decide(record(3, 1), record(4, 2)) == Keep(record(3, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"public_ips": PerFamily(underlay(4, 99))},
        {"backend_type": "host-gw", "backend_data": PerFamily()},
        {"backend_data": PerFamily({"VNI": 1, "VtepMAC": mac(200)})},
    ],
    ids=["address", "backend", "mac"],
)
def test_what_changed_is_written_over_our_own_record_and_the_subnet_stays(change: dict[str, Any]) -> None:
    asked = replace(wish(1), **change)
    found = decide(record(3, 1), by=asked, local_addresses=frozenset({underlay(4, 1)}))
    assert isinstance(found, Adopt)
    assert found.record == record(3, 1)
    assert found.wanted.subnets == record(3, 1).subnets
    assert found.wanted.public_ips == asked.public_ips


def test_a_new_address_after_a_restart_is_proven_by_the_etcd_lease() -> None:
    mine = record(3, 1, public_ips=PerFamily(underlay(4, 77)), etcd_lease=42)
    assert isinstance(decide(mine, by=wish(1, etcd_lease=42)), Adopt)
    found = decide(mine, by=wish(1, etcd_lease=43))
    assert isinstance(found, Conflict)
    assert found.reason == "node id node-1 is also used by 192.0.2.77, which holds 10.5.3.0-24"
    assert "--node-id" in found.fix


def test_a_record_without_etcd_lease_proves_nothing() -> None:
    mine = record(3, 1, public_ips=PerFamily(underlay(4, 77)), etcd_lease=0)
    assert isinstance(decide(mine), Conflict)


def test_a_clone_that_fell_silent_is_taken_over() -> None:
    mine = record(3, 1, public_ips=PerFamily(underlay(4, 77)))
    assert isinstance(decide(mine, by=wish(1, silent=frozenset({mine.key}))), Adopt)


def test_our_address_under_a_live_node_is_a_conflict_that_names_both() -> None:
    found = decide(record(3, 2, public_ips=PerFamily(underlay(4, 1))))
    assert isinstance(found, Conflict)
    assert found.reason == (
        "public address 192.0.2.1 is already published by node id node-2, which holds 10.5.3.0-24"
    )
    assert "--iface" in found.fix
    assert "--public-ip" in found.fix


def test_an_address_that_another_host_publishes_is_not_taken_on() -> None:
    mine, theirs = record(3, 1, public_ips=PerFamily(underlay(4, 77))), record(4, 2)
    theirs = replace(theirs, public_ips=PerFamily(underlay(4, 1)), mod_revision=50)
    found = decide(mine, theirs, by=wish(1, held=mine))
    assert isinstance(found, Conflict)
    assert "192.0.2.1 is already published by node id node-2" in found.reason
    silent = wish(1, held=mine, silent=frozenset({theirs.key}))
    assert isinstance(decide(mine, theirs, by=silent), Adopt)


def test_of_two_hosts_with_one_address_the_later_one_has_the_conflict() -> None:
    mine, theirs = record(3, 1), record(4, 2, public_ips=PerFamily(underlay(4, 1)))
    assert isinstance(decide(replace(mine, mod_revision=50), theirs), Conflict)
    assert decide(mine, replace(theirs, mod_revision=50)) == Keep(mine)


def test_our_address_under_a_silent_node_is_adopted_with_its_subnet() -> None:
    theirs = record(3, 2, public_ips=PerFamily(underlay(4, 1)))
    found = decide(theirs, by=wish(1, silent=frozenset({theirs.key})))
    assert isinstance(found, Adopt)
    assert (found.record, found.wanted.node_id) == (theirs, "node-1")


def test_of_several_records_with_our_address_the_oldest_counts() -> None:
    one, other = record(9, 2, create_revision=3), record(3, 3, create_revision=4)
    ours: PerFamily[IPAddress] = PerFamily(underlay(4, 1))
    records = [replace(one, public_ips=ours), replace(other, public_ips=ours)]
    for order in (records, records[::-1]):
        found = decide(*order)
        assert isinstance(found, Conflict)
        assert found.record.key == "10.5.9.0-24"


@pytest.mark.parametrize("previous", [(), (PerFamily(subnet(4, 3)),)], ids=["no subnet.env", "subnet.env"])
def test_go_flannels_record_of_this_host_is_adopted(previous: tuple[Subnets, ...]) -> None:
    gos = record(3, 1, node_id="")
    found = decide(gos, by=wish(1, previous=previous))
    assert isinstance(found, Adopt)
    assert found.record == gos
    assert found.wanted == replace(gos, node_id="node-1", create_revision=0, mod_revision=0, etcd_lease=0)


def test_go_flannels_record_that_contradicts_subnet_env_is_not_ours() -> None:
    gos = record(3, 1, node_id="")
    found = decide(gos, by=wish(1, previous=(PerFamily(subnet(4, 9)),)))
    assert isinstance(found, Conflict)
    assert "a node without id" in found.reason


def test_the_subnet_of_the_last_run_comes_first() -> None:
    asked = wish(1, previous=(PerFamily(ip_network("10.9.1.0/24")), PerFamily(subnet(4, 88))))
    claim = decide(record(3, 2), by=asked)
    assert isinstance(claim, Claim)
    assert claim.wanted.key == "10.5.88.0-24"


@pytest.mark.parametrize("net", ["10.5.88.0/24", "10.5.88.64/26", "10.5.88.0/21"])
def test_unless_somebody_else_has_it_or_part_of_it(net: str) -> None:
    theirs = record(3, 2, subnets=PerFamily(ip_network(net)))
    claim = decide(theirs, by=wish(1, previous=(PerFamily(subnet(4, 88)),)))
    assert isinstance(claim, Claim)
    assert claim.wanted.key != "10.5.88.0-24"


def test_of_two_overlapping_leases_the_younger_host_yields() -> None:
    mine = record(3, 1, create_revision=9)
    older = record(4, 2, subnets=PerFamily(ip_network("10.5.2.0/23")), key="10.5.2.0-23", create_revision=5)
    assert decide(mine, older) == Release(
        mine, "10.5.3.0-24 overlaps the older lease 10.5.2.0-23 of 192.0.2.2"
    )
    assert decide(mine, replace(older, create_revision=10, mod_revision=10)) == Keep(mine)


def test_a_key_that_was_garbage_when_we_took_our_lease_does_not_outrank_it() -> None:
    mine = record(3, 1, create_revision=9)
    mended = record(4, 2, subnets=PerFamily(ip_network("10.5.0.0/22")), key="10.5.0.0-22", create_revision=5)
    assert decide(mine, replace(mended, mod_revision=20)) == Keep(mine)


@pytest.mark.parametrize("net", ["0.0.0.0/1", "10.0.0.0/8", "10.5.0.0/17"])
def test_a_key_for_half_of_everything_keeps_nobody_out(net: str) -> None:
    greedy = record(4, 2, subnets=PerFamily(ip_network(net)), key=net.replace("/", "-"), create_revision=1)
    assert isinstance(decide(greedy), Claim)
    assert decide(greedy, record(3, 1, create_revision=9)) == Keep(record(3, 1, create_revision=9))


def test_an_unreadable_key_of_another_length_is_taken_too() -> None:
    seen = replace(snapshot_of([]), bad={"10.5.88.0-22": "garbage"})
    asked = wish(1, previous=(PerFamily(subnet(4, 88)),))
    claim = decide_lease(strategies.config(), seen, host(1), asked, Random(1))
    assert isinstance(claim, Claim)
    assert claim.wanted.key != "10.5.88.0-24"


def test_a_record_under_our_node_id_from_elsewhere_does_not_keep_us_from_our_own() -> None:
    mine, elsewhere = record(3, 1), record(2, 1, public_ips=PerFamily(underlay(4, 77)))
    assert decide(mine, elsewhere) == Keep(mine)


def test_what_a_clone_wrote_over_our_record_is_not_taken_back() -> None:
    held = record(3, 1)
    stolen = replace(held, public_ips=PerFamily(underlay(4, 77)), mod_revision=20)
    asked = wish(1, held=held, etcd_lease=held.etcd_lease)
    assert isinstance(decide(stolen, by=asked), Conflict)


def test_our_own_new_address_is_written_over_the_record_we_hold() -> None:
    held = record(3, 1, public_ips=PerFamily(underlay(4, 77)))
    assert isinstance(decide(held, by=wish(1, held=held)), Adopt)


def test_of_two_leases_of_our_own_the_older_is_kept() -> None:
    first, second = record(3, 1), record(4, 1)
    assert decide(second, first) == Release(
        second, "10.5.4.0-24 is a second lease of this host beside 10.5.3.0-24"
    )
    assert find_own(snapshot_of([second, first]), host(1), wish(1)) == first
    assert find_own(snapshot_of([second, first]), host(2), wish(2)) is None


@pytest.mark.parametrize(
    "net",
    ["10.5.3.0/25", "10.5.0.0/24", "10.6.3.0/24"],
    ids=["length", "below SubnetMin", "outside"],
)
def test_a_lease_that_does_not_fit_is_released(net: str) -> None:
    mine = record(3, 1, subnets=PerFamily(ip_network(net)))
    assert isinstance(decide(mine), Release)


def test_a_family_too_many_or_too_few_does_not_fit() -> None:
    both = PerFamily(subnet(4, 3), subnet(6, 3))
    assert isinstance(decide(record(3, 1, subnets=both)), Release)
    dual = strategies.config(families=(4, 6))
    assert isinstance(decide(record(3, 1), by=wish(1, families=(4, 6)), config=dual), Release)


def test_none_free_says_how_many_there_are() -> None:
    found = decide(record(1, 2), record(2, 3), config=strategies.config(subnets=2))
    assert isinstance(found, Wait)
    assert found.reason.startswith(
        "no free subnet: 10.5.0.0/16 gives 2 subnets of /24 (10.5.1.0 to 10.5.2.0), 2 leases stand"
    )
    assert "SubnetMax" in found.fix


def test_the_hosts_own_networks_are_not_handed_out() -> None:
    local = (ip_network("10.5.1.0/24"), ip_network("10.5.2.128/25"))
    claim = decide(config=strategies.config(subnets=3), local_networks=local)
    assert isinstance(claim, Claim)
    assert claim.wanted.key == "10.5.3.0-24"
    found = decide(config=strategies.config(subnets=2), local_networks=local)
    assert isinstance(found, Wait)
    assert "0 leases stand and the rest overlaps this host's own networks" in found.reason


def test_a_family_without_a_public_address_is_waited_for() -> None:
    found = decide(config=strategies.config(families=(4, 6)))
    assert isinstance(found, Wait)
    assert "IPv6" in found.reason


def test_addresses_of_a_family_that_is_not_in_use_are_not_published() -> None:
    asked = wish(1, families=(4, 6))
    claim = decide(by=asked)
    assert isinstance(claim, Claim)
    assert (claim.wanted.public_ips.v6, claim.wanted.backend_data.v6) == (None, None)
    stands = replace(claim.wanted, create_revision=5)
    assert decide(stands, by=asked) == Keep(stands)


# --- properties of decisions ----------------------------------------------------------------------


@st.composite
def registries(draw: st.DrawFn) -> tuple[NetworkConfig, Snapshot, Wish]:
    """Whatever a registry may hold about few hosts and few subnets, and what host 1 brings along."""
    records: dict[str, Record] = {}
    for age in range(draw(st.integers(0, 6))):
        number, holder = draw(st.integers(0, 7)), draw(st.integers(1, 3))
        found = record(number, holder, create_revision=draw(st.integers(1, 4)), mod_revision=age + 1)
        if draw(st.integers(0, 3)) == 0:
            found = replace(found, node_id="")
        if draw(st.integers(0, 3)) == 0:
            found = replace(found, public_ips=PerFamily(underlay(4, draw(st.integers(1, 3)))))
        if draw(st.integers(0, 4)) == 0:
            net = ip_network((int(ip_address("10.5.0.0")) + 0x200 * (number // 2), 23))
            found = replace(found, subnets=PerFamily(net), key=f"10.5.{number // 2 * 2}.0-23")
        if draw(st.integers(0, 4)) == 0:
            found = replace(found, etcd_lease=draw(st.sampled_from((0, 8))))
        records[found.key] = found
    asked = wish(
        1,
        previous=tuple(PerFamily(subnet(4, n)) for n in draw(st.lists(st.integers(0, 9), max_size=2))),
        etcd_lease=draw(st.sampled_from((0, 8))),
        silent=frozenset(draw(st.sets(st.sampled_from(sorted(records) or [""]), max_size=1))),
    )
    return strategies.config(subnets=6), snapshot_of(list(records.values())), asked


@thorough
@given(registries(), st.integers(0, 9))
def test_never_writes_over_a_record_of_another_node(
    world: tuple[NetworkConfig, Snapshot, Wish], seed: int
) -> None:
    config, seen, asked = world
    match decide_lease(config, seen, host(1), asked, Random(seed)):
        case Claim(wanted):
            assert wanted.key not in seen.records
            nets = [net for other in seen.records.values() for net in other.subnets.values()]
            assert not any(net.overlaps(mine) for net in nets for mine in wanted.subnets.values())
        case Adopt(old, _) | Release(old, _):
            assert seen.records[old.key] is old
            assert old.node_id in ("node-1", "") or old.key in asked.silent
            names_us = underlay(4, 1) in old.public_ips.values()
            assert names_us or old.etcd_lease == asked.etcd_lease or old.key in asked.silent
        case Keep(kept):
            assert kept.node_id == "node-1"


@thorough
@given(registries(), st.integers(0, 9), st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(
    world: tuple[NetworkConfig, Snapshot, Wish], seed: int, random: Random
) -> None:
    config, seen, asked = world
    keys = random.sample(list(seen.records), len(seen.records))
    shuffled = replace(seen, records={key: seen.records[key] for key in keys})
    both = [decide_lease(config, one, host(1), asked, Random(seed)) for one in (seen, shuffled)]
    assert both[0] == both[1]


@thorough
@given(registries(), st.integers(0, 9))
def test_alone_the_decisions_lead_to_a_lease_kept_or_to_a_stand(
    world: tuple[NetworkConfig, Snapshot, Wish], seed: int
) -> None:
    config, seen, asked = world
    etcd = Etcd.of(seen)
    node = Node(1, asked, config, Random(seed))
    for _ in range(12):
        if not node.turn(etcd):
            break
    assert not node.turn(etcd), "writes for ever"
    last = node.decide(etcd.snapshot())
    assert isinstance(last, Keep | Conflict | Wait)
    if isinstance(last, Keep):
        nets = [
            net
            for other in etcd.snapshot().records.values()
            if other.key != last.record.key and other.mod_revision < last.record.create_revision
            for net in other.subnets.values()
        ]
        assert not any(net.overlaps(mine) for net in nets for mine in last.record.subnets.values())


# --- races ----------------------------------------------------------------------------------------


@dataclass
class Etcd:
    """Keys with values and revisions, and transactions guarded as drivers/etcd.py guards them."""

    entries: dict[str, tuple[str, int, int, int]] = field(default_factory=dict)
    revision: int = 1

    @classmethod
    def of(cls, seen: Snapshot) -> Etcd:
        stored = {
            key: (encode(r), r.create_revision, r.mod_revision, r.etcd_lease)
            for key, r in seen.records.items()
        }
        return cls(stored, seen.revision)

    def snapshot(self) -> Snapshot:
        return snapshot(listing_of(self.entries, self.revision))

    def create(self, wanted: Record, lease: int) -> bool:
        if wanted.key in self.entries:
            return False
        self.revision += 1
        self.entries[wanted.key] = (encode(wanted), self.revision, self.revision, lease)
        return True

    def replace(self, old: Record, wanted: Record) -> bool:
        if not self._is_still(old):
            return False
        self.revision += 1
        _, created, _, lease = self.entries[old.key]
        self.entries[old.key] = (encode(wanted), created, self.revision, lease)
        return True

    def delete(self, old: Record) -> bool:
        if not self._is_still(old):
            return False
        self.revision += 1
        del self.entries[old.key]
        return True

    def _is_still(self, old: Record) -> bool:
        return old.key in self.entries and self.entries[old.key][2] == old.mod_revision


@dataclass
class Node:
    """A host that decides on what it saw last, however old that is."""

    number: int
    wish: Wish
    config: NetworkConfig
    random: Random
    seen: Snapshot | None = None

    @property
    def host(self) -> Host:
        families = tuple(family for family, _ in self.wish.public_ips.items())
        return host(self.number, families)

    def decide(self, seen: Snapshot) -> Decision:
        return decide_lease(self.config, seen, self.host, self.wish, self.random)

    def look(self, etcd: Etcd) -> None:
        self.seen = etcd.snapshot()

    def act(self, etcd: Etcd) -> bool:
        """Whether anything was written."""
        if self.seen is None:
            return False
        match self.decide(self.seen):
            case Claim(wanted):
                return etcd.create(wanted, lease=1000 + self.number)
            case Adopt(old, wanted):
                return etcd.replace(old, wanted)
            case Release(old, _):
                return etcd.delete(old)
        return False

    def turn(self, etcd: Etcd) -> bool:
        self.look(etcd)
        return self.act(etcd)


@st.composite
def crowds(draw: st.DrawFn) -> list[Node]:
    """Hosts that want the same subnets as others, by what they had or by what they draw; all have looked."""
    families: tuple[Family, ...] = draw(strategies.FAMILIES)
    count = draw(st.integers(2, 5))
    room = draw(st.integers(count - 1, count + 2))
    nodes = []
    for number in range(1, count + 1):
        had = {family: subnet(family, draw(st.integers(1, room))) for family in families}
        asked = wish(number, families, previous=draw(st.sampled_from(((), (per_family(had),)))))
        config = strategies.config(families=families, subnets=room)
        nodes.append(Node(number, asked, config, Random(draw(st.integers(0, 1)))))
        nodes[-1].look(Etcd())
    return nodes


STEPS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(("look", "act", "act"))), max_size=25)


@thorough
@given(crowds(), STEPS, st.lists(st.booleans(), min_size=5, max_size=5), st.booleans())
def test_racing_hosts_end_with_exclusive_subnets(
    nodes: list[Node], steps: list[tuple[int, str]], early: list[bool], halves: bool
) -> None:
    """Some know a new config before the others, so that leases of two lengths overlap."""
    families = tuple(family for family, _ in nodes[0].config.ranges.items())
    new_config = strategies.config(families=families, subnets=len(nodes), halves=halves)
    for node, knows in zip(nodes, early, strict=False):
        node.config = new_config if knows else node.config
    etcd = Etcd()
    for which, action in steps:
        race(nodes[which % len(nodes)], action, etcd)
    for node in nodes:
        node.config = new_config
    settle(nodes, etcd)
    assert_settled(nodes, etcd)


@thorough
@given(crowds(), STEPS)
def test_hosts_in_too_small_a_network_wait_and_leave_the_others_alone(
    nodes: list[Node], steps: list[tuple[int, str]]
) -> None:
    etcd = Etcd()
    for which, action in steps:
        race(nodes[which % len(nodes)], action, etcd)
    settle(nodes, etcd)
    assert_settled(nodes, etcd)


def race(node: Node, action: str, etcd: Etcd) -> None:
    """One step of one host, which may change no record but its own."""
    if action == "look":
        node.look(etcd)
        return
    before = etcd.snapshot().records
    node.act(etcd)
    after = etcd.snapshot().records
    for key, old in before.items():
        if after.get(key) != old:
            assert old.node_id == f"node-{node.number}", f"{key} was not ours to change"


def settle(nodes: Sequence[Node], etcd: Etcd) -> None:
    for _ in range(4 * len(nodes)):
        wrote = [node.turn(etcd) for node in nodes]
        if not any(wrote):
            return
    raise AssertionError("they write for ever")


def assert_settled(nodes: Sequence[Node], etcd: Etcd) -> None:
    """All subnets exclusive, as many hosts served as fit, nobody with anything left to write."""
    seen = etcd.snapshot()
    assert not seen.bad
    decisions = [node.decide(seen) for node in nodes]
    assert all(isinstance(found, Keep | Wait) for found in decisions), decisions
    kept = [found.record for found in decisions if isinstance(found, Keep)]
    assert len(kept) == len(seen.records)
    for family, allowed in nodes[0].config.ranges.items():
        nets = [net for lease in kept if (net := lease.subnets.get(family)) is not None]
        assert not any(one.overlaps(other) for i, one in enumerate(nets) for other in nets[:i])
        assert set(nets) <= set(by_enumeration(allowed, []))
        assert len(nets) == min(len(nodes), len(by_enumeration(allowed, [])))


@usual
@given(crowds(), st.integers(0, 4))
def test_a_kept_lease_is_kept_while_others_come(nodes: list[Node], turns: int) -> None:
    etcd = Etcd()
    first, *others = nodes
    first.turn(etcd)
    found = first.decide(etcd.snapshot())
    assert isinstance(found, Keep)
    for node in others * (turns + 1):
        node.turn(etcd)
        assert first.decide(etcd.snapshot()) == found
