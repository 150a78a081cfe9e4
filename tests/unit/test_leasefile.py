"""The state file: what it tells of Networks."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING

from flanneld_py.backends import backend_of
from flanneld_py.core.statefile import SavedState, parse_state
from flanneld_py.daemon.inbox import LeaseState, Network
from flanneld_py.daemon.leasefile import LeaseFile
from flanneld_py.daemon.leaseground import Ground
from flanneld_py.model import Record
from tests.unit.strategies import config, host, per_family, snapshot_of, subnet, underlay

if TYPE_CHECKING:
    from pathlib import Path

    from flanneld_py.addresses import IPNetwork

OLD, OLDER, FORMER = ip_network("10.7.0.0/16"), ip_network("10.8.0.0/16"), ip_network("10.9.0.0/16")
LAST = SavedState("/coreos.com/network", "node-of-last-run", networks=(OLD, OLDER))


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
    file = LeaseFile(path, LAST, (OLD, OLDER), lambda: clean)
    file.save(own(7), ground(), 0.0)
    assert told(path) == (ip_network("10.5.0.0/16"), FORMER, OLD, OLDER)
    clean = True
    file.save(own(8), ground(), 0.0)
    assert told(path) == (ip_network("10.5.0.0/16"), FORMER)
    clean = False
    file.save(own(9), ground(), 0.0)
    assert told(path) == (ip_network("10.5.0.0/16"), FORMER)


def test_a_network_is_told_before_anything_is_made_in_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    file = LeaseFile(path, LAST, (OLD, OLDER))
    file.remember((FORMER,))
    first = parse_state(path.read_text())
    assert first is not None
    assert (first.node_id, first.networks) == (LAST.node_id, (FORMER, OLD, OLDER))
    file.save(own(7), ground(), 0.0)
    wide = ip_network("10.4.0.0/15")
    file.remember((wide, FORMER))
    saved = parse_state(path.read_text())
    assert saved is not None
    assert (saved.networks[0], saved.subnets) == (wide, own(7).subnets)
    # The lease may be saved by what was known before.
    file.save(own(8), ground(), 0.0)
    assert wide in told(path)


def test_what_is_known_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    file = LeaseFile(path, LAST)
    file.save(own(7), ground(), 0.0)
    path.unlink()
    file.remember(ground().network.config.networks)
    file.save(own(7), ground(), 0.0)
    assert not path.exists()


def test_what_could_not_be_written_is_tried_again_with_the_next_target(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.mkdir()
    file = LeaseFile(path, LAST)
    file.remember((FORMER,))
    path.rmdir()
    file.remember((FORMER,))
    assert FORMER in told(path)


def test_what_could_not_be_written_is_written_when_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "full" / "state.json"
    path.parent.touch()
    file = LeaseFile(path, LAST)
    file.save(own(7), ground(), 0.0)
    file.write_owed()
    path.parent.unlink()
    path.parent.mkdir()
    file.write_owed()
    saved = parse_state(path.read_text())
    assert saved is not None
    assert saved.subnets == own(7).subnets
    path.unlink()
    file.write_owed()
    assert not path.exists(), "nothing is owed any more"
