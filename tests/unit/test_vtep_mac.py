"""Which MAC a vxlan device of ours gets: peers' knowledge first, and never one that another has."""

from __future__ import annotations

from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.backends.vxlan import Vxlan
from flanneld_py.core.nodeid import vtep_mac
from flanneld_py.model import Record
from tests.unit.leasing import record
from tests.unit.strategies import PREFIX, host, mac

VXLAN = Vxlan((4,))
MADE = vtep_mac("node-1", PREFIX, "flannel.1")
HERE = replace(host(1), mac_seed="seed")


def published(here: object = HERE, own: Record | None = None, taken: set[str] | None = None) -> str:
    found: str = VXLAN.published(here, own, taken or set()).backend_data.v4["VtepMAC"]  # type: ignore[arg-type,index]
    return found


def test_the_record_comes_first_then_the_device_then_our_identity() -> None:
    with_device = replace(HERE, macs={"flannel.1": mac(8)})
    own = replace(record(3, 1), vtep_macs=PerFamily(mac(7)))
    assert published(with_device, own) == mac(7)
    assert published(with_device) == mac(8)
    assert published() == MADE


def test_one_that_another_has_is_passed_over() -> None:
    with_device = replace(HERE, macs={"flannel.1": mac(8)})
    assert published(with_device, taken={mac(8)}) == MADE
    other = published(with_device, taken={mac(8), MADE})
    assert other not in {mac(8), MADE}
    assert int(other[:2], 16) & 0b11 == 0b10, "local and unicast"
    assert other == published(with_device, taken={mac(8), MADE}), "the same as long as the seed is kept"


def test_two_hosts_with_one_node_id_do_not_flee_to_the_same() -> None:
    clone = replace(HERE, mac_seed="another seed")
    assert published(taken={MADE}) != published(clone, taken={MADE})
