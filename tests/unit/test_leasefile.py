"""The state file: what it tells of Networks."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING

from flanneld_py.backends import backend_of
from flanneld_py.core.statefile import parse_state
from flanneld_py.daemon.inbox import LeaseState, Network
from flanneld_py.daemon.leasefile import LeaseFile
from flanneld_py.daemon.leaseground import Ground
from flanneld_py.model import Record
from tests.unit.strategies import config, host, per_family, snapshot_of, subnet, underlay

if TYPE_CHECKING:
    from pathlib import Path

    from flanneld_py.model import IPNetwork

OLD, OLDER, FORMER = ip_network("10.7.0.0/16"), ip_network("10.8.0.0/16"), ip_network("10.9.0.0/16")


def ground() -> Ground:
    fresh = config()
    return Ground(Network(fresh, backend_of(fresh), (FORMER,)), host(1), snapshot_of([]), LeaseState())


def own(number: int) -> Record:
    return Record(f"10.5.{number}.0-24", per_family({4: subnet(4, number)}), per_family({4: underlay(4, 1)}))


def told(path: Path) -> tuple[IPNetwork, ...]:
    saved = parse_state(path.read_text())
    assert saved is not None
    return saved.networks


def test_networks_of_earlier_runs_stay_until_the_kernel_is_in_order(tmp_path: Path) -> None:
    """A process that is killed between subnet.env and its deletes must not forget what it is to delete."""
    path, clean = tmp_path / "state.json", False
    file = LeaseFile(path, (OLD, OLDER), lambda: clean)
    file.save(own(7), ground(), 0.0)
    assert told(path) == (ip_network("10.5.0.0/16"), FORMER, OLD, OLDER)
    clean = True
    file.save(own(8), ground(), 0.0)
    assert told(path) == (ip_network("10.5.0.0/16"), FORMER)
    clean = False
    file.save(own(9), ground(), 0.0)
    assert told(path) == (ip_network("10.5.0.0/16"), FORMER)
