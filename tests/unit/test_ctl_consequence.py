"""flannelctl config set: what it says that the hosts make of a new config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flanneld_py.cli.ctl.consequence import config_in_force, consequence
from flanneld_py.cli.ctl.settings import resolve
from flanneld_py.core.config import parse_config
from flanneld_py.model import Entry, Listing
from tests.unit.control_sockets import daemon

AT_ONCE = "daemons take it over at once"
UNKNOWN = " (no daemon of this prefix answers here, so this compares it with the config that was stored)"


def text(options: dict[str, Any] | None = None, **fields: Any) -> bytes:
    backend = {"Type": "vxlan", **(options or {})}
    return json.dumps({"Network": "10.7.0.0/16", **fields, "Backend": backend}).encode()


def told(
    fresh: bytes, *, stored: bytes | None, in_force: bytes | None = None, flannel: tuple[str, ...] = ()
) -> str:
    """With two hosts of ours, 10.7.3.0-24 and 10.7.9.0-24."""
    ours = {"10.7.3.0-24": "three", "10.7.9.0-24": "nine"}
    records = [
        Entry(f"subnets/{key}", record(number, node_id), 5, 5, etcd_lease=number + 1)
        for number, (key, node_id) in enumerate((ours | dict.fromkeys(flannel, "")).items())
    ]
    config = [Entry("config", stored, 2, 2)] if stored is not None else []
    listing = Listing(9, 1, (*config, *records))
    return consequence(listing, parse_config(fresh), in_force)


def record(number: int, node_id: str) -> bytes:
    data = {"VNI": 1, "VtepMAC": f"0e:00:00:00:00:0{number}"}
    value = {
        "PublicIP": f"192.0.2.{number + 1}",
        "PublicIPv6": None,
        "BackendType": "vxlan",
        "BackendData": data,
    }
    return json.dumps(value | ({"NodeID": node_id} if node_id else {})).encode()


PENDING = text(Network="10.9.0.0/16")


def test_the_config_in_force_counts_and_not_the_one_that_waits() -> None:
    assert told(text(), stored=PENDING, in_force=text()) == "it is in force here already"
    again = told(text({"MTU": 1400}, Network="10.9.0.0/16"), stored=PENDING, in_force=text())
    assert again.startswith(
        "pending on every host that runs, as Network 10.7.0.0/16 becomes 10.9.0.0/16: hosts get other subnets"
    )
    assert again.endswith("flannelctl config apply, or a restart, takes it over there")
    ranged = text(SubnetMin="10.7.1.0", SubnetMax="10.7.20.0")
    assert told(ranged, stored=text(SubnetLen=26), in_force=text()) == AT_ONCE


def test_without_a_daemon_it_is_said_what_is_compared() -> None:
    assert told(text({"MTU": 1400}), stored=text()) == AT_ONCE + UNKNOWN
    assert told(text(), stored=PENDING).startswith("pending on every host that runs")
    assert told(text(), stored=None) == AT_ONCE
    assert told(text(), stored=b"{") == AT_ONCE


def test_only_hosts_outside_a_new_range_are_excepted() -> None:
    assert told(text({"MTU": 1400}), stored=text(), in_force=text()) == AT_ONCE
    narrow = told(text(SubnetMin="10.7.5.0"), stored=text(), in_force=text())
    assert narrow == (
        f"{AT_ONCE}, but for 10.7.3.0-24, outside the new range, where it is pending: "
        "flannelctl config apply, or a restart, takes it over there"
    )


@pytest.mark.parametrize("options", [{"VNI": 7}, {"Port": 4789}])
def test_hosts_of_go_flannel_keep_what_all_must_have_in_common(options: dict[str, Any]) -> None:
    fresh = text(options)
    assert told(fresh, stored=text(), in_force=text()) == AT_ONCE
    said = told(fresh, stored=text(), in_force=text(), flannel=("10.7.40.0-24",))
    assert said.startswith("pending on every host that runs, as Backend.")
    assert "hosts of flannel would not follow (10.7.40.0-24)" in said


def test_hosts_of_go_flannel_follow_later() -> None:
    flannel = ("10.7.40.0-24", "10.7.41.0-24")
    assert told(text({"MTU": 1400}), stored=text(), in_force=text(), flannel=flannel) == (
        f"{AT_ONCE}; hosts of Go flannel (10.7.40.0-24 and 1 more) read it at their next start"
    )


def test_only_the_daemon_of_the_prefix_is_asked(tmp_path: Path) -> None:
    answer = {"key": "/x/config", "in_force": "{}"}
    flags = {"subnet-file": f"{tmp_path}/subnet.env"}
    assert config_in_force(resolve(flags, {}, {})) is None
    with daemon(tmp_path, config=lambda: answer):
        assert config_in_force(resolve({**flags, "etcd-prefix": "/x"}, {}, {})) == b"{}"
        assert config_in_force(resolve({**flags, "etcd-prefix": "/y"}, {}, {})) is None
    with daemon(tmp_path, status=dict):  # an older one
        assert config_in_force(resolve({**flags, "etcd-prefix": "/x"}, {}, {})) is None
