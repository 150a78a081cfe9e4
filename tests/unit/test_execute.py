"""Carrying out a plan when something fails: what can be done is done, what needs the failed op waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.core.plan import plan
from flanneld_py.daemon.execute import Executor
from flanneld_py.datapath import TunLink
from flanneld_py.drivers.base import Driver
from flanneld_py.errors import KernelError
from flanneld_py.model import (
    Link,
    NextHop,
    Op,
    Outcome,
    Route,
    Scope,
    State,
    Table,
    VxlanLink,
)
from tests.unit.fake_kernel import FakeKernel, collide, fixed, kernels
from tests.unit.strategies import PREFIX, TABLES, neighbour, states, thorough, usual

PARTS: tuple[tuple[Table, ...], ...] = (
    ("links", "addrs"),
    ("pumps", "tunnel"),
    ("fdb", "neighs", "nexthops", "routes", "blackholes"),
    ("offloads",),
    ("rules",),
    ("sysctls", "files"),
)
"""Tables by driver, as in the daemon."""


class FakeDriver:
    """Some tables of a FakeKernel; refuses what it is told to refuse."""

    def __init__(
        self, kernel: FakeKernel, tables: tuple[Table, ...], refuses: Callable[[Op], bool] = lambda _: False
    ) -> None:
        self.kernel = kernel
        self.tables = tables
        self.refuses = refuses
        self.batches: list[list[Op]] = []

    def observe(self, scope: Scope) -> State:
        state = self.kernel.observe(scope.sysctls)
        return State(**{table: dict(state.table(table)) for table in self.tables})

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        self.batches.append(list(ops))
        return [Outcome(op, "Refused" if self.refuses(op) else self.kernel.apply(op)) for op in ops]


TOGETHER: set[tuple[str, str]] = {("set", "fdb"), ("set", "neighs"), ("set", "nexthops")}
"""What may be given to a driver at once, as none of it needs the other."""
LINK = VxlanLink(1, 8472, "eth0", ip_address("192.0.2.1"), 1450, "02:00:00:00:00:01", "")


def executor(
    kernel: FakeKernel, refuses: Callable[[Op], bool] = lambda _: False
) -> tuple[Executor, list[FakeDriver]]:
    drivers = [FakeDriver(kernel, tables, refuses) for tables in PARTS]
    typed: list[Driver] = [*drivers]
    return Executor(typed), drivers


def scope(want: State) -> Scope:
    return Scope(PREFIX, (), sysctls=frozenset(want.sysctls))


@dataclass(frozen=True)
class Case:
    """A plan of which some ops will be refused."""

    want: State
    have: State
    ops: Sequence[Op]
    refused: frozenset[Op]

    @property
    def hopeless(self) -> set[Op]:
        """The ops that need a refused one, directly or not."""
        lost = set(self.refused)
        while more := {op for op in self.ops if op not in lost and any(self.needs(op, o) for o in lost)}:
            lost |= more
        return lost - self.refused

    def needs(self, op: Op, other: Op) -> bool:
        """Whether the kernel, or the promise of a file, wants `other` done before `op`."""
        if (op.table, op.verb, other.table, other.verb) == ("links", "set", "links", "del"):
            # A device cannot be made beside the one that it replaces.
            return op.key == other.key or collide(self.want.links[op.key], self.have.links[other.key])
        if other.verb == "del" or (other.table == "links" and self.stands(other.key)):
            return False
        if op.verb == "del":
            if op.table == "links":
                return self.needs_new(self.have.links[op.key], op.key, other)
            # A device needs an address all the time, the new one or the old one.
            address = op.table == other.table == "addrs" and op.key[0] == other.key[0]
            return address or (op.table, op.key) in self.under_the_old(other)
        if op.table == "files":
            return other.table in ("links", "addrs", "pumps")
        return (other.table, other.key) in self.under(op)

    def needs_new(self, old: Link, name: str, other: Op) -> bool:
        """Whether a device stays, or is put back, unless `other` is done."""
        if any(name == n or collide(old, new) for n, new in self.want.links.items()):
            return other.table == "links" and (name == other.key or collide(old, other.value))
        if other.table == "routes":
            return other.key in self.have.routes and self.have.routes[other.key].nexthop.dev == name
        if other.table not in ("links", "addrs"):
            return False
        new = self.want.links.get(other.key if other.table == "links" else other.key[0])
        if isinstance(new, TunLink) or isinstance(old, TunLink):
            return new is not None
        return new is not None and new.local.version == old.local.version

    def stands(self, device: str) -> bool:
        before, new = self.have.links.get(device), self.want.links.get(device)
        changed = before is not None and new is not None and fixed(before) != fixed(new)
        return before is not None and before.up and not changed and Op("del", "links", device) not in self.ops

    def under_the_old(self, op: Op) -> list[tuple[str, object]]:
        """Table and key of what carries the row that `op` replaces."""
        if op.table == "routes" and op.key in self.have.routes:
            hop = self.have.routes[op.key].nexthop
            if hop.via is None:
                return []
            fdb = (hop.dev, self.have.neighs.get(neighbour(hop)))
            return [("nexthops", hop), ("neighs", neighbour(hop)), ("fdb", fdb)]
        if op.table == "neighs" and op.key in self.have.neighs:
            return [("fdb", (op.key[0], self.have.neighs[op.key]))]
        return []

    def under(self, op: Op) -> list[tuple[str, object]]:
        """Table and key of what must stand for `op`."""
        match op.table, op.key, op.value:
            case ("addrs" | "fdb" | "neighs", (dev, _), _) | ("offloads" | "pumps", dev, _):
                return [("links", dev)]
            case "tunnel", (dev, _), _:
                return [("pumps", dev)]
            case "sysctls", str(path), _:
                return [("links", path.split("/")[-2])]
            case ("nexthops", NextHop() as hop, _) | ("routes", _, Route(NextHop(via=None) as hop)):
                return [("links", hop.dev)]
            case "routes", _, Route(hop):
                fdb = (hop.dev, self.want.neighs.get(neighbour(hop)))
                return [("links", hop.dev), ("nexthops", hop), ("neighs", neighbour(hop)), ("fdb", fdb)]
        return []


def check_failure(case: Case, kernel: FakeKernel) -> None:
    """All but the refused ops and what needs them are done, and the next pass ends it."""
    works, drivers = executor(kernel, refuses=lambda op: op in case.refused)
    works.observe(scope(case.want))
    outcomes = works.apply(case.ops, case.want, case.have)
    assert [outcome.op for outcome in outcomes] == case.ops
    failed = {op for op, error in outcomes if error is not None}
    assert failed == case.refused | case.hopeless
    tried = {op for driver in drivers for batch in driver.batches for op in batch}
    # That an old device is in the way is for the kernel to say, and what was deleted for nothing is put back.
    news = {op for op in tried if case.have.table(op.table).get(op.key) != op.value}
    assert {op.table for op in case.hopeless & news} <= {"links"}
    # A device may be deleted and made anew: what was done last stands.
    for op in {(op.table, op.key): op for op in case.ops if op not in failed}.values():
        rows = kernel.tables[op.table]
        assert (rows.get(op.key) == op.value) if op.verb == "set" else (op.key not in rows)
    heal(case.want, kernel)


def heal(want: State, kernel: FakeKernel) -> None:
    """As the reconciler does: read, plan, apply, until there is nothing left."""
    works, _ = executor(kernel)
    for _ in range(3):
        have = works.observe(scope(want))
        assert all(error is None for _, error in works.apply(plan(want, have), want, have))
    assert works.observe(scope(want)) == want


def test_rules_that_cannot_be_read_hold_up_nothing_else() -> None:
    kernel = FakeKernel.holding(State(links={"flannel.1": LINK}))
    works, drivers = executor(kernel)
    readable = works.observe(scope(State()))
    apart: tuple[Table, ...] = ("rules",)

    def unreadable(scope: Scope) -> State:
        raise KernelError(f"rules of {scope.prefix} kept changing")

    (rules,) = (driver for driver in drivers if driver.tables == ("rules",))
    rules.observe = unreadable  # type: ignore[method-assign]
    assert works.observe(scope(State()), apart=apart) == readable
    assert works.unread == {"rules": f"rules of {PREFIX} kept changing"}
    with pytest.raises(KernelError, match="kept changing"):
        works.observe(scope(State()))
    del rules.observe
    works.observe(scope(State()), apart=apart)
    assert works.unread == {}


# --- properties -----------------------------------------------------------------------------------


@usual
@given(states(), kernels())
def test_a_failure_at_any_one_op_costs_that_op_and_what_needs_it(want: State, kernel: FakeKernel) -> None:
    have = kernel.observe(want.sysctls)
    ops = plan(want, have)
    for refused in ops:
        check_failure(Case(want, have, ops, frozenset({refused})), kernel.copy())


@thorough
@given(states(), kernels(), st.data())
def test_so_do_several_failures(want: State, kernel: FakeKernel, data: st.DataObject) -> None:
    have = kernel.observe(want.sysctls)
    ops = plan(want, have)
    if ops:
        refused = data.draw(st.frozensets(st.sampled_from(ops), min_size=1, max_size=6))
        check_failure(Case(want, have, ops, refused), kernel)


@thorough
@given(states(), kernels())
def test_devices_that_cannot_be_made_cost_no_peer(want: State, kernel: FakeKernel) -> None:
    works, _ = executor(kernel, refuses=lambda op: (op.verb, op.table) == ("set", "links") and op in ops)
    have = works.observe(scope(want))
    ops = plan(want, have)
    works.apply(ops, want, have)
    left = kernel.observe(want.sysctls)
    assert have.routes.keys() & want.routes.keys() <= left.routes.keys()
    for subnet in have.routes.keys() & want.routes.keys():
        if left.routes[subnet] == have.routes[subnet] != want.routes[subnet]:
            hop = have.routes[subnet].nexthop
            device = hop.dev
            if hop.via is None:
                continue
            mac = have.neighs.get(neighbour(hop))
            assert left.neighs.get(neighbour(hop)) == mac
            assert left.fdb.get((device, str(mac))) == have.fdb.get((device, str(mac)))
            assert left.links.get(device) == have.links.get(device)


@usual
@given(states(), kernels())
def test_a_table_is_in_one_batch_to_its_driver_and_some_are_together(want: State, kernel: FakeKernel) -> None:
    works, drivers = executor(kernel)
    have = works.observe(scope(want))
    ops = plan(want, have)
    assert [outcome.op for outcome in works.apply(ops, want, have)] == ops
    batches = [batch for driver in drivers for batch in driver.batches]
    assert sorted(map(repr, ops)) == sorted(repr(op) for batch in batches for op in batch)
    for driver in drivers:
        for batch in driver.batches:
            assert batch
            kinds_of = {(op.verb, op.table) for op in batch}
            assert len(kinds_of) == 1 or kinds_of <= TOGETHER
            assert {table for _, table in kinds_of} <= set(driver.tables)
        # Deleting links may come first and last, everything else once.
        kinds = [kind for kind, _ in groupby((op.verb, op.table) for batch in driver.batches for op in batch)]
        assert sum((batch[0].verb, batch[0].table) in TOGETHER for batch in driver.batches) <= 1
        assert all(one != next_ for one, next_ in pairwise(kinds))
        assert all(kinds.count(kind) == 1 or kind == ("del", "links") for kind in kinds)


@usual
@given(states())
def test_observe_puts_the_tables_together(state: State) -> None:
    works, _ = executor(FakeKernel.holding(state))
    assert works.observe(scope(state)) == state


# --- by example -----------------------------------------------------------------------------------


def test_what_cannot_be_read_is_no_empty_table() -> None:
    class Deaf(FakeDriver):
        def observe(self, scope: Scope) -> State:
            raise KernelError(f"netlink: no buffer space ({scope.prefix})")

    works = Executor([FakeDriver(FakeKernel(), PARTS[0]), Deaf(FakeKernel(), PARTS[1])])
    with pytest.raises(KernelError, match="no buffer space"):
        works.observe(scope(State()))


def test_nothing_to_do_bothers_no_driver() -> None:
    works, drivers = executor(FakeKernel())
    assert works.apply([], State(), State()) == []
    assert [driver.batches for driver in drivers] == [[]] * len(PARTS)


def test_a_failed_delete_holds_nothing_back() -> None:
    ops = [Op("del", "routes", "x"), Op("del", "links", "flannel.9"), Op("set", "files", "/run/a", "1")]
    works, drivers = executor(FakeKernel(), refuses=lambda op: op.verb == "del")
    errors = [error for _, error in works.apply(ops, State(files={"/run/a": "1"}), State())]
    assert errors == ["Refused", "Refused", None]
    assert drivers[2].kernel.tables["files"] == {"/run/a": "1"}


def test_a_device_that_was_deleted_for_nothing_is_put_back_with_what_hung_on_it() -> None:
    """One with GBP cannot stand beside one without on the same port."""
    hop = NextHop("flannel.1", ip_address("10.5.2.0"), onlink=True)
    have = State(
        links={"flannel.1": LINK},
        addrs={("flannel.1", ip_interface("10.5.1.0/32")): True},
        fdb={("flannel.1", "02:00:00:00:00:02"): ip_address("192.0.2.2")},
        neighs={neighbour(hop): "02:00:00:00:00:02"},
        nexthops={hop: True},
        routes={ip_network("10.5.2.0/24"): Route(hop)},
    )
    want = replace(have, links={"flannel.1": replace(LINK, gbp=True)})
    kernel = FakeKernel.holding(have)
    works, _ = executor(
        kernel, refuses=lambda op: op.table == "links" and op.value == want.links["flannel.1"]
    )
    works.observe(scope(want))
    outcomes = works.apply(plan(want, have), want, have)
    assert [error for _, error in outcomes][:2] == ["was put back, as link flannel.1: Refused", "Refused"]
    assert all(error is not None for _, error in outcomes)
    assert kernel.observe(()) == have


@pytest.mark.parametrize("held", [False, True])
def test_a_device_stays_until_the_one_of_another_vni_stands(held: bool) -> None:
    have = State(links={"flannel.1": LINK})
    want = State(links={"flannel.7": replace(LINK, vni=7)})
    kernel = FakeKernel.holding(have)
    works, _ = executor(kernel, refuses=lambda op: op.key == "flannel.7")
    works.observe(scope(want))
    made, deleted = plan(want, have)
    if held:
        ((_, error),) = works.apply([deleted], want, have, held=[made])
    else:
        *_, (_, error) = works.apply([made, deleted], want, have)
    assert error == "waits for what shall replace it"
    assert kernel.tables["links"] == have.links


def test_a_device_that_could_be_made_although_the_old_one_stayed_carries_rows() -> None:
    ops = [
        Op("del", "links", "flannel.1"),
        Op("set", "links", "flannel.1", LINK),
        Op("set", "addrs", ("flannel.1", "10.5.1.0/32"), True),
    ]
    works, _ = executor(FakeKernel(), refuses=lambda op: op.verb == "del")
    assert [error for _, error in works.apply(ops, State(), State())] == ["Refused", None, None]


def test_the_reason_is_told_and_it_is_the_first_cause() -> None:
    hop = NextHop("flannel.1", ip_address("10.5.2.0"), onlink=True)
    want = State(
        links={"flannel.1": LINK},
        addrs={("flannel.1", ip_interface("10.5.1.0/32")): True},
        fdb={("flannel.1", "02:00:00:00:00:02"): ip_address("192.0.2.2")},
        neighs={neighbour(hop): "02:00:00:00:00:02"},
        nexthops={hop: True},
        routes={ip_network("10.5.2.0/24"): Route(hop)},
        files={"/run/flannel/subnet.env": "text"},
    )
    works, _ = executor(FakeKernel(), refuses=lambda op: op.table == "links")
    errors = [error for _, error in works.apply(plan(want, State()), want, State())]
    assert errors == ["Refused", *["waits for link flannel.1: Refused"] * 6]


def test_a_peer_keeps_its_old_path_until_the_new_one_stands() -> None:
    old, new = (NextHop("eth0", ip_address(via), onlink=False) for via in ("192.0.2.2", "198.51.100.2"))
    subnet = ip_network("10.5.2.0/24")
    have = State(nexthops={old: True}, routes={subnet: Route(old)})
    want = State(nexthops={new: True}, routes={subnet: Route(new)})
    kernel = FakeKernel.holding(have)
    works, _ = executor(kernel, refuses=lambda op: op.table == "nexthops" and op.verb == "set")
    works.apply(plan(want, have), want, have)
    assert kernel.tables["routes"] == {subnet: Route(old)}


def test_what_is_held_back_counts_as_failed() -> None:
    hop = NextHop("eth0", ip_address("192.0.2.2"), onlink=False)
    route = Op("set", "routes", ip_network("10.5.2.0/24"), Route(hop))
    want = State(nexthops={hop: True}, routes={route.key: route.value})
    works, drivers = executor(FakeKernel())
    ((_, error),) = works.apply([route], want, State(), held=[Op("set", "nexthops", hop, True)])
    assert error == "waits for nexthop via 192.0.2.2 dev eth0: failed before, is tried again later"
    assert [driver.batches for driver in drivers] == [[]] * len(PARTS)


def test_a_device_that_is_up_carries_rows_although_its_change_is_held_back() -> None:
    """Otherwise a device whose MTU the kernel refuses would keep a new peer waiting, up to a minute."""
    neigh = Op("set", "neighs", ("flannel.1", ip_address("10.5.2.0")), "02:00:00:00:00:02")
    have = State(links={"flannel.1": LINK})
    want = State(links={"flannel.1": replace(LINK, mtu=9000)}, neighs={neigh.key: neigh.value})
    works, _ = executor(FakeKernel.holding(have))
    held = [Op("set", "links", "flannel.1", want.links["flannel.1"])]
    assert not works.is_standing("links", "flannel.1")
    works.observe(scope(want))
    assert works.is_standing("links", "flannel.1")
    ((_, error),) = works.apply([neigh], want, have, held)
    assert error is None


def test_all_tables_have_their_driver() -> None:
    assert sorted(table for tables in PARTS for table in tables) == sorted(TABLES)
