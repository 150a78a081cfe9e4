"""Carrying out a plan when something fails: what can be done is, what depends on a failure waits, the rest heals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.plan import plan
from flanneld_py.daemon.execute import Executor
from flanneld_py.drivers.base import Driver
from flanneld_py.errors import KernelError
from flanneld_py.model import NextHop, Op, Outcome, Route, Scope, State, Table
from tests.unit.fake_kernel import FakeKernel, kernels
from tests.unit.strategies import PREFIX, TABLES, states, thorough, usual

PARTS: tuple[tuple[Table, ...], ...] = (
    ("links", "addrs"),
    ("fdb", "neighs", "nexthops", "routes"),
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


def executor(
    kernel: FakeKernel, refuses: Callable[[Op], bool] = lambda _: False
) -> tuple[Executor, list[FakeDriver]]:
    drivers = [FakeDriver(kernel, tables, refuses) for tables in PARTS]
    typed: list[Driver] = [*drivers]
    return Executor(typed), drivers


def scope(want: State) -> Scope:
    return Scope(PREFIX, (), sysctls=frozenset(want.sysctls))


def dependants(ops: Sequence[Op], causes: Sequence[Op], want: State) -> set[Op]:
    """The ops that cannot be done when `causes` are not, by what the kernel or the promise of a file needs."""
    lost, found = set(causes), True
    while found:
        found = {op for op in ops if op not in lost and any(needs(op, other, want) for other in lost)}
        lost |= found
    return lost - set(causes)


def needs(op: Op, other: Op, want: State) -> bool:
    """Whether `op` needs `other` to have been done."""
    if op.verb == "del":
        return False
    if other.verb == "del":
        # The kernel refuses the new device beside the old one.
        return op.table == other.table == "links"
    match op.table, op.key, op.value:
        case "addrs" | "fdb" | "neighs", (dev, _), _:
            return (other.table, other.key) == ("links", dev)
        case "sysctls", str(path), _:
            return other.table == "links" and f"/{other.key}/" in path
        case "nexthops", NextHop() as hop, _:
            return (other.table, other.key) == ("links", hop.dev)
        case "routes", _, Route() as route:
            hop = route.nexthop
            mac = want.neighs.get((hop.dev, hop.via))
            return (other.table, other.key) in [
                ("links", hop.dev),
                ("nexthops", hop),
                ("neighs", (hop.dev, hop.via)),
                ("fdb", (hop.dev, mac)),
            ]
        case "files", _, _:
            return other.table in ("links", "addrs")
    return False


def check_failure(want: State, kernel: FakeKernel, refused: Sequence[Op], ops: Sequence[Op]) -> None:
    """Apply `ops` with some refused; all others but their dependants are done, and the next pass ends it."""
    works, drivers = executor(kernel, refuses=lambda op: op in refused)
    outcomes = works.apply(ops, want)
    assert [outcome.op for outcome in outcomes] == list(ops)
    failed = {op for op, error in outcomes if error is not None}
    hopeless = dependants(ops, refused, want)
    assert failed == set(refused) | hopeless
    tried = {op for driver in drivers for batch in driver.batches for op in batch}
    # Only the kernel can tell that an old device is in the way, and what a sysctl needs; the rest is not tried.
    assert {op for op in hopeless & tried if op.table not in ("links", "sysctls")} == set()
    for op in set(ops) - failed:
        rows = kernel.tables[op.table]
        assert (rows.get(op.key) == op.value) if op.verb == "set" else (op.key not in rows)
    heal(want, kernel)


def heal(want: State, kernel: FakeKernel) -> None:
    """As the reconciler does: read, plan, apply, until there is nothing left."""
    works, _ = executor(kernel)
    for _ in range(3):
        ops = plan(want, works.observe(scope(want)))
        assert all(error is None for _, error in works.apply(ops, want))
    assert works.observe(scope(want)) == want


# --- properties -----------------------------------------------------------------------------------


@usual
@given(states(), kernels())
def test_a_failure_at_any_one_op_costs_that_op_and_what_needs_it(want: State, kernel: FakeKernel) -> None:
    ops = plan(want, kernel.observe(want.sysctls))
    for refused in ops:
        check_failure(want, kernel.copy(), [refused], ops)


@thorough
@given(states(), kernels(), st.data())
def test_so_do_several_failures(want: State, kernel: FakeKernel, data: st.DataObject) -> None:
    ops = plan(want, kernel.observe(want.sysctls))
    if ops:
        refused = data.draw(st.lists(st.sampled_from(ops), min_size=2, max_size=6))
        check_failure(want, kernel, refused, ops)


@usual
@given(states(), kernels())
def test_every_table_in_one_batch_to_its_driver(want: State, kernel: FakeKernel) -> None:
    works, drivers = executor(kernel)
    ops = plan(want, works.observe(scope(want)))
    assert [outcome.op for outcome in works.apply(ops, want)] == ops
    batches = [batch for driver in drivers for batch in driver.batches]
    assert sorted(map(repr, ops)) == sorted(repr(op) for batch in batches for op in batch)
    for driver in drivers:
        for batch in driver.batches:
            assert batch
            assert {(op.verb, op.table) for op in batch} == {(batch[0].verb, batch[0].table)}
            assert batch[0].table in driver.tables
        # Deleting links may come first and last, everything else once.
        kinds = [(batch[0].verb, batch[0].table) for batch in driver.batches]
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
    assert works.apply([], State()) == []
    assert [driver.batches for driver in drivers] == [[], [], []]


def test_a_failed_delete_holds_nothing_back() -> None:
    ops = [Op("del", "routes", "x"), Op("del", "links", "flannel.9"), Op("set", "files", "/run/a", "1")]
    works, drivers = executor(FakeKernel(), refuses=lambda op: op.verb == "del")
    errors = [error for _, error in works.apply(ops, State(files={"/run/a": "1"}))]
    assert errors == ["Refused", "Refused", None]
    assert drivers[2].kernel.tables["files"] == {"/run/a": "1"}


def test_the_reason_is_told_with_what_is_waited_for() -> None:
    ops = [
        Op("set", "fdb", ("flannel.1", "02:00:00:00:00:02"), "192.0.2.2"),
        Op("set", "links", "flannel.1", None),
        Op("set", "addrs", ("flannel.1", "10.5.1.0/32"), True),
    ]
    works, _ = executor(FakeKernel(), refuses=lambda op: op.table == "links")
    errors = [error for _, error in works.apply(ops, State())]
    assert errors == ["Cannot find device flannel.1", "Refused", "waits for links flannel.1: Refused"]


def test_all_tables_have_their_driver() -> None:
    assert sorted(table for tables in PARTS for table in tables) == sorted(TABLES)
