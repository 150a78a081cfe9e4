"""The few records that a decision on the lease looks at are all that it could take for ours or in our way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.addresses import PerFamily
from flanneld_py.core.leasedecision import Wish
from flanneld_py.core.leaseproof import is_ours, names_us, near_us
from flanneld_py.model import Record
from tests.unit.leasing import record, wish
from tests.unit.strategies import host, snapshot_of, subnet, underlay

NUMBERS = st.integers(1, 4)


@st.composite
def records(draw: st.DrawFn) -> Record:
    number = draw(NUMBERS)
    address = PerFamily(
        *draw(
            st.tuples(
                st.sampled_from((None, *(underlay(4, n) for n in range(1, 4)))),
                st.sampled_from((None, None, *(underlay(6, n) for n in range(1, 3)))),
            )
        )
    )
    return record(
        number,
        draw(NUMBERS),
        node_id=draw(st.sampled_from(("", "node-1", "node-2", "node-3"))),
        etcd_lease=draw(st.integers(0, 3)),
        mod_revision=draw(st.integers(number, 6)),
        public_ips=address,
    )


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    mine = st.none() | records()
    return wish(
        1,
        draw(st.sampled_from(((4,), (4, 6), (6,)))),
        previous=(PerFamily(subnet(4, 1)),),
        etcd_lease=draw(st.integers(0, 3)),
        last_key=draw(st.sampled_from(("", record(1, 1).key, record(2, 1).key))),
        held=draw(mine),
        written=draw(mine),
        granted=draw(st.integers(0, 3)),
        silent=frozenset(draw(st.sets(st.builds(lambda n: record(n, 1).key, NUMBERS)))),
    )


@given(st.lists(records(), unique_by=lambda found: found.key, max_size=4), wishes())
def test_none_is_missed_that_is_ours_or_names_us_or_bears_our_node_id(some: list[Record], by: Wish) -> None:
    us = host(1, (4, 6))
    near = near_us(snapshot_of(some), us, by)
    matter = [r for r in some if is_ours(r, us, by) or names_us(r, by) or r.node_id == us.node_id]
    assert [r for r in some if r in near] == near
    assert all(r in near for r in matter)


def test_strangers_are_none_of_them() -> None:
    strangers = [record(number, number) for number in range(2, 50)]
    assert near_us(snapshot_of([*strangers, record(60, 1)]), host(1), wish(1)) == [record(60, 1)]
