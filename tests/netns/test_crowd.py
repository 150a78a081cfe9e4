"""The thousands of hosts of the bench, in a real etcd."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import Lab, LabError
from flanneld_py.lab.crowd import TXN_OPS, Crowd, members

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def test_what_is_put_is_what_etcd_holds_until_it_is_deleted(lab: Lab) -> None:
    some = members(2 * TXN_OPS + 1)
    with Crowd(lab.etcd, "vxlan") as crowd:
        first = crowd.put(some)
        wanted = {str(member.subnet).replace("/", "-"): json.loads(member.record("vxlan")) for member in some}
        assert lab.etcd.leases() == wanted
        assert crowd.delete(some[1:]) > first
        assert list(lab.etcd.leases()) == list(wanted)[:1]
        assert lab.etcd.requests()["KV/Txn"] == 5


def test_one_that_cannot_be_put_is_told(lab: Lab) -> None:
    with Crowd(lab.etcd, "vxlan") as crowd:
        lab.etcd.stop()
        for _ in range(2):
            with pytest.raises(LabError, match="what puts the crowd's records failed"):
                crowd.put(members(1))
