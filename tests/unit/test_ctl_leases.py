"""flannelctl leases: the table and the JSON, from records as the registry gives them."""

from __future__ import annotations

import json
from pathlib import Path

from flanneld_py.cli.ctl.leases import own_node_id, render, to_json
from flanneld_py.cli.ctl.settings import resolve
from flanneld_py.core.records import snapshot
from flanneld_py.model import Entry, Listing, Snapshot

OWN = "a" * 32
MAC = "82:4b:b1:2c:8f:a1"


def value(ip: str, node_id: str = "", **more: object) -> bytes:
    record = {"PublicIP": ip, "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": MAC}, **more}
    return json.dumps({**record, **({"NodeID": node_id} if node_id else {})}).encode()


def seen(*entries: Entry) -> Snapshot:
    return snapshot(Listing(17, 1, (Entry("config", b"{}"), *entries)))


TEN = Entry("subnets/10.5.10.0-24", value("192.0.2.10", OWN), etcd_lease=0x1A)
NINE = Entry("subnets/10.5.9.0-24", value("192.0.2.9"), etcd_lease=0x2B)
BAD = Entry("subnets/10.5.8.0-24", value("127.0.0.1"))
DUAL = Entry(
    "subnets/10.5.7.0-24&fd00:5::-64",
    value("192.0.2.7", PublicIPv6="2001:db8::7", BackendV6Data={"VtepMAC": MAC}),
)


def test_records_by_subnet_and_our_own_marked() -> None:
    lines = render(seen(TEN, NINE), OWN, None, "/p").splitlines()
    assert [line.split() for line in lines] == [
        ["SUBNET", "PUBLIC", "IP", "BACKEND", "VTEP", "MAC", "NODE"],
        ["10.5.9.0/24", "192.0.2.9", "vxlan", MAC, "-"],
        ["*", "10.5.10.0/24", "192.0.2.10", "vxlan", MAC, OWN],
        [],
        ["2", "leases", "at", "revision", "17"],
    ]
    assert len({line.index("192.0.2.") for line in lines[1:3]}) == 1, "columns are aligned"


def test_nothing_is_marked_when_our_node_id_is_not_known() -> None:
    assert "*" not in render(seen(TEN, NINE), "", None, "/p")
    assert not any(row["own"] for row in to_json(seen(TEN, NINE), "", None)["leases"])


def test_bad_records_have_a_row_with_the_reason() -> None:
    lines = render(seen(NINE, BAD), OWN, None, "/p").splitlines()
    (row,) = (line for line in lines if line.startswith("!"))
    assert row.split()[1] == "10.5.8.0-24"
    assert "PublicIP 127.0.0.1 is a loopback address" in row
    assert lines[-1] == "1 lease, 1 bad record at revision 17"
    assert render(seen(BAD), OWN, None, "/p").splitlines()[-1] == "0 leases, 1 bad record at revision 17"


def test_a_key_cannot_steer_the_terminal() -> None:
    text = render(seen(Entry("subnets/\x1b[2J\n10.5.1.0-24", b"{}")), OWN, None, "/p")
    assert "\x1b" not in text
    assert "\\x1b[2J\\n10.5.1.0-24" in text


def test_no_leases() -> None:
    assert render(seen(), OWN, None, "/p") == "no leases below /p/subnets at revision 17"


def test_both_families_in_a_row() -> None:
    row = render(seen(DUAL), OWN, None, "/p").splitlines()[1]
    assert "10.5.7.0/24 fd00:5::/64" in row
    assert "192.0.2.7 2001:db8::7" in row


def test_time_left() -> None:
    lifetimes = {"10.5.10.0-24": 86_399, "10.5.9.0-24": -1, "10.5.7.0-24&fd00:5::-64": None}
    rows = render(seen(TEN, NINE, DUAL), OWN, lifetimes, "/p").splitlines()
    assert [row.rpartition("  ")[2] for row in rows[:4]] == ["TIME LEFT", "for ever", "ended", "23 h 59 min"]
    found = to_json(seen(TEN, NINE, DUAL), OWN, lifetimes)["leases"]
    assert {row["key"]: row["ttl"] for row in found} == lifetimes


def test_json() -> None:
    assert to_json(seen(TEN, BAD), OWN, None) == {
        "revision": 17,
        "leases": [
            {
                "key": "10.5.10.0-24",
                "subnets": ["10.5.10.0/24"],
                "public_ips": ["192.0.2.10"],
                "backend": "vxlan",
                "vtep_macs": [MAC],
                "node_id": OWN,
                "etcd_lease": "1a",
                "own": True,
            }
        ],
        "bad": {
            "10.5.8.0-24": "PublicIP 127.0.0.1 is a loopback address: expected the address of the host that "
            "holds 10.5.8.0/24"
        },
    }


def test_our_node_id_is_that_of_the_same_prefix(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"prefix": "/p", "node_id": OWN}))
    flags = {"subnet-file": f"{tmp_path}/subnet.env"}
    assert own_node_id(resolve({**flags, "etcd-prefix": "/p"}, {}, {})) == OWN
    assert own_node_id(resolve({**flags, "etcd-prefix": "/q"}, {}, {})) == ""
    assert own_node_id(resolve({"subnet-file": f"{tmp_path}/b.env", "etcd-prefix": "/p"}, {}, {})) == ""
