"""What is aimed at after each of several changes is what is aimed at when all is made anew."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import Family
from flanneld_py.backends import BACKENDS, backend_of
from flanneld_py.core import layered
from flanneld_py.core.admit import admit
from flanneld_py.core.plan import apply_all, plan
from flanneld_py.daemon.aim import Aim
from flanneld_py.daemon.inbox import Network
from flanneld_py.daemon.target import Inputs, Settings, Target, target_for
from flanneld_py.model import OwnLease, Record
from tests.unit import strategies
from tests.unit.strategies import PREFIX, clashing_records, host, snapshot_of, thorough
from tests.unit.test_desired import record

SETTINGS = Settings(PREFIX, "/run/flannel/subnet.env")
every_backend = pytest.mark.parametrize("name", sorted(BACKENDS))


def inputs(name: str, records: dict[str, Record], families: Any = (4,), **options: Any) -> Inputs:
    config = strategies.config(name, families, {key.lower(): value for key, value in options.items()})
    network = Network(config, backend_of(config))
    published = network.backend.published(host(1, families), None)
    own = replace(record(1, families, published.backend_type), node_id=host(1, families).node_id)
    return Inputs(network, host(1, families), OwnLease(own, 60), snapshot_of((own, *records.values())))


def made_anew(given_: Inputs) -> Target:
    config, record = given_.network.config, given_.own.record
    kind = given_.network.backend.published(given_.host, record).backend_type
    return target_for(given_, SETTINGS, admit(given_.snapshot, record, config, given_.host, kind))


@pytest.fixture(params=[0, layered.SMALL], ids=["shared", "copied"])
def _tables(request: pytest.FixtureRequest) -> Iterator[None]:
    """As tables of thousands are changed, and as small ones are."""
    with patch.object(layered, "SMALL", request.param):
        yield


@every_backend
@pytest.mark.usefixtures("_tables")
@thorough
@given(st.data())
def test_the_same_as_made_anew(name: str, data: st.DataObject) -> None:
    families: tuple[Family, ...] = data.draw(st.sampled_from([(4,), (4, 6)]))
    options = {"DirectRouting": data.draw(st.booleans())} if name == "vxlan" else {}
    made = inputs(name, {}, families, **options)
    kind = made.network.backend.published(made.host, None).backend_type
    aim, known, have = Aim(), {}, None
    for _ in range(data.draw(st.integers(1, 6))):
        names = [f"r{number}" for number in data.draw(st.sets(st.integers(2, 9)))]
        alone = data.draw(st.booleans())
        for key in names:
            number = int(key[1:])
            fresh = record(number, families, kind) if alone else data.draw(clashing_records(key, families))
            known[key] = replace(fresh, backend_type=kind)
        for key in data.draw(st.sets(st.sampled_from(sorted(known)))) if known else ():
            del known[key]
        fresh_inputs = made._replace(snapshot=snapshot_of((made.own.record, *known.values())))
        wanted = made_anew(fresh_inputs)
        found = aim.target_of(fresh_inputs, (), SETTINGS)
        assert found.state == wanted.state
        assert found.peers.accepted == wanted.peers.accepted
        assert found.devices == wanted.devices
        assert dict(found.scope.adoptable) == dict(wanted.scope.adoptable)
        assert replace(found.scope, adoptable={}) == replace(wanted.scope, adoptable={})
        if found.differs is not None:
            assert found.differs.since is have
            ops = plan(found.differs.want, found.differs.have)
            assert set(ops) == set(plan(wanted.state, have))
            assert [(op.verb, op.table) for op in ops] == [
                (op.verb, op.table) for op in plan(wanted.state, have)
            ]
            assert apply_all(have, ops) == wanted.state
        have = found.state


@every_backend
def test_one_of_thousands_costs_its_own_rows(name: str) -> None:
    made = inputs(name, {})
    kind = made.network.backend.published(made.host, None).backend_type
    others = {f"r{number}": record(number, (4,), kind) for number in range(2, 100)}
    aim, rng = Aim(), Random(1)
    aim.target_of(made._replace(snapshot=snapshot_of((made.own.record, *others.values()))), (), SETTINGS)
    for _ in range(5):
        del others[rng.choice(sorted(others))]
        fresh = made._replace(snapshot=snapshot_of((made.own.record, *others.values())))
        differs = aim.target_of(fresh, (), SETTINGS).differs
        assert differs is not None
        assert len(plan(differs.want, differs.have)) == {"vxlan": 4, "host-gw": 2, "udp": 1, "alloc": 0}[name]
        assert not differs.want.fdb
