"""Hosts that decide on old snapshots: whatever the order, they end with subnets of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import Family, PerFamily
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.config import parse_config
from flanneld_py.core.leasedecision import (
    Adopt,
    Claim,
    Conflict,
    Decision,
    Keep,
    Move,
    Release,
    Rename,
    Restore,
    Wait,
    Wish,
)
from flanneld_py.core.records import encode, snapshot
from flanneld_py.model import Host, NetworkConfig, Record, Snapshot
from tests.unit import strategies
from tests.unit.leasing import record, wish
from tests.unit.strategies import (
    by_enumeration,
    host,
    listing_of,
    per_family,
    snapshot_of,
    subnet,
    thorough,
    underlay,
    usual,
)

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
        case Adopt(old, _) | Move(old, _) | Release(old, _):
            assert seen.records[old.key] is old
            if old.etcd_lease != asked.etcd_lease or not asked.etcd_lease:
                assert old.node_id in ("node-1", "") or old.key in asked.silent
                assert underlay(4, 1) in old.public_ips.values() or old.key in asked.silent
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

    def overwrite(self, wanted: Record) -> bool:
        self.revision += 1
        _, created, _, _ = self.entries[wanted.key]
        self.entries[wanted.key] = (encode(wanted), created, self.revision, wanted.etcd_lease)
        return True

    def move(self, old: Record, wanted: Record) -> bool:
        if not self._is_still(old) or wanted.key in self.entries:
            return False
        self.revision += 1
        _, _, _, lease = self.entries.pop(old.key)
        self.entries[wanted.key] = (encode(wanted), self.revision, self.revision, lease)
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
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or f"node-{self.number}"

    @property
    def host(self) -> Host:
        families = tuple(family for family, _ in self.wish.public_ips.items())
        return host(self.number, families, node_id=self.name)

    def decide(self, seen: Snapshot) -> Decision:
        return decide_lease(self.config, seen, self.host, self.wish, self.random)

    def look(self, etcd: Etcd) -> None:
        self.seen = etcd.snapshot()

    def act(self, etcd: Etcd) -> bool:
        """Whether anything was written."""
        match self.decide(self.seen or Etcd().snapshot()):
            case Claim(wanted):
                return etcd.create(wanted, lease=1000 + self.number)
            case Adopt(old, wanted):
                return etcd.replace(old, wanted)
            case Move(old, wanted):
                return etcd.move(old, wanted)
            case Release(old, _):
                return etcd.delete(old)
            case Restore(wanted):
                return etcd.overwrite(wanted)
            case found:
                self.name += "-clone" if isinstance(found, Rename) else ""
                return isinstance(found, Rename)

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


@thorough
@given(crowds(), st.data())
def test_after_garbage_and_a_restart_every_host_has_the_subnet_that_it_had(
    nodes: list[Node], data: st.DataObject
) -> None:
    etcd = Etcd()
    settle(nodes, etcd)
    had = {r.node_id: r for r in etcd.snapshot().records.values()}
    garbled = data.draw(st.sets(st.sampled_from(sorted(had))))
    for name in garbled:
        key = had[name].key
        _, created, _, _ = etcd.entries[key]
        etcd.revision += 1
        etcd.entries[key] = ("garbage", created, etcd.revision, 0)
    served = [node for node in nodes if node.name in had]
    for node in served:
        last = had[node.name]
        node.wish = replace(
            node.wish, previous=(last.subnets,), last_key=last.key, etcd_lease=last.etcd_lease
        )
    settle(data.draw(st.permutations(served)), etcd)
    seen = etcd.snapshot()
    assert not seen.bad
    assert {r.node_id: (r.key, r.etcd_lease) for r in seen.records.values()} == {
        name: (r.key, r.etcd_lease) for name, r in had.items()
    }


@thorough
@given(st.integers(2, 5), st.integers(1, 6), STEPS, st.booleans())
def test_nobody_gives_a_lease_back_before_another_is_his(
    count: int, room: int, steps: list[tuple[int, str]], restarted: bool
) -> None:
    """Into another Network that may have too little room, each host at a time of its own."""
    etcd, nodes = Etcd(), []
    for number in range(1, count + 1):
        nodes.append(Node(number, wish(number), strategies.config(), Random(number)))
        nodes[-1].turn(etcd)
    held = etcd.snapshot().records
    for node in nodes:
        lease = next(r for r in held.values() if r.node_id == node.name)
        node.wish = wish(node.number, previous=(lease.subnets,), held=None if restarted else lease)
        node.config = parse_config(
            f'{{"Network":"10.6.0.0/16","SubnetMin":"10.6.1.0","SubnetMax":"10.6.{room}.0",'
            '"Backend":{"Type":"vxlan"}}'
        )
        node.look(etcd)
    for which, action in steps:
        race(nodes[which % count], action, etcd)
        assert {r.node_id for r in etcd.snapshot().records.values()} == {node.name for node in nodes}
    settle(nodes, etcd)
    moved = [r for r in etcd.snapshot().records.values() if r.key not in held]
    assert len(moved) == min(count, room)
    assert {r.node_id for r in etcd.snapshot().records.values()} == {node.name for node in nodes}


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
