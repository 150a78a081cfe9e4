"""flannelctl leases: the table and the JSON, from records as the registry gives them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flanneld_py.cli.ctl.leases import (
    Lifetimes,
    Verdict,
    find_rows,
    find_verdict,
    judge,
    own_node_id,
    render,
    to_json,
)
from flanneld_py.cli.ctl.settings import resolve
from flanneld_py.model import Entry, Listing
from tests.unit.control_sockets import daemon

OWN = "a" * 32
MAC = "82:4b:b1:2c:8f:a1"
CONFIG = b'{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
BY_DAEMON = Verdict("daemon", OWN)


def value(ip: str, node_id: str = "", mac: str = MAC, **more: object) -> bytes:
    record = {"PublicIP": ip, "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": mac}, **more}
    return json.dumps({**record, **({"NodeID": node_id} if node_id else {})}).encode()


def listing(*entries: Entry, config: bytes = CONFIG) -> Listing:
    return Listing(17, 1, (Entry("config", config), *entries))


def shown(
    found: Listing, verdict: Verdict = BY_DAEMON, lifetimes: Lifetimes | None = None, width: int | None = None
) -> list[str]:
    return render(17, find_rows(found, verdict), verdict, lifetimes, "/p", width).splitlines()


def as_json(found: Listing, verdict: Verdict, lifetimes: Lifetimes | None = None) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(
        json.dumps(to_json(17, find_rows(found, verdict), verdict, lifetimes), ensure_ascii=True)
    )
    return told


TEN = Entry("subnets/10.5.10.0-24", value("192.0.2.10", OWN), etcd_lease=0x1A)
NINE = Entry("subnets/10.5.9.0-24", value("192.0.2.9"), etcd_lease=0x2B)
OURS = Entry("subnets/10.5.11.0-24", value("192.0.2.11", "beta"), etcd_lease=0x2C)
RESERVED = Entry("subnets/10.5.12.0-24", b'{"PublicIP":"192.0.2.12"}')
BAD = Entry("subnets/10.5.8.0-24", value("127.0.0.1"))
DUAL = Entry(
    "subnets/10.5.7.0-24&fd00:5::-64",
    value("192.0.2.7", PublicIPv6="2001:db8::7", BackendV6Data={"VtepMAC": MAC}),
)
LIFETIMES = {0x1A: 86_399, 0x2B: -1, 0x2C: 60}


# --- the table ------------------------------------------------------------------------------------


def test_a_row_for_each_by_address_with_its_owner_and_time_left() -> None:
    lines = shown(listing(TEN, NINE, OURS, RESERVED), lifetimes=LIFETIMES)
    assert [line.split() for line in lines] == [
        ["SUBNET", "PUBLIC", "IP", "BACKEND", "NODE", "OWNER", "TIME", "LEFT", "STATE"],
        ["10.5.9.0/24", "192.0.2.9", "vxlan", "-", "flannel", "ended", "ok"],
        ["10.5.10.0/24", "192.0.2.10", "vxlan", "aaaaaaaa…", "this", "host", "23", "h", "59", "min", "ok"],
        ["10.5.11.0/24", "192.0.2.11", "vxlan", "beta", "flanneld-py", "1", "min", "ok"],
        ["10.5.12.0/24", "192.0.2.12", "-", "-", "reserved", "for", "ever", "ok"],
        [],
        ["4", "leases", "at", "revision", "17"],
    ]
    assert len({line.index("192.0.2.") for line in lines[1:5]}) == 1, "columns are aligned"
    assert max(map(len, lines)) <= 80


def test_no_host_is_this_one_when_our_node_id_is_not_known() -> None:
    verdict = Verdict("config")
    assert not any("this host" in line for line in shown(listing(TEN, NINE), verdict)[:-1])
    assert not any(row["own"] for row in as_json(listing(TEN, NINE), verdict)["leases"])


@pytest.mark.parametrize("backend", ["udp", "alloc"])
def test_records_of_a_backend_that_writes_no_type_have_that_of_the_config(backend: str) -> None:
    config = b'{"Network":"10.5.0.0/16","Backend":{"Type":"%s"}}' % backend.encode()
    host = Entry("subnets/10.5.3.0-24", b'{"PublicIP":"192.0.2.3","NodeID":"n"}', 1, 1, 7)
    reserved = Entry("subnets/10.5.4.0-24", b'{"PublicIP":"192.0.2.4"}', 1, 1, 0)
    found = listing(host, reserved, config=config)
    verdict = judge(found, "")
    assert [line.split()[2] for line in shown(found, verdict)[1:3]] == [backend, "-"]
    assert as_json(found, verdict)["leases"][0]["backend"] == "", "as it is stored"


def test_bad_records_have_a_row_with_the_reason() -> None:
    lines = shown(listing(NINE, BAD, TEN), Verdict("daemon", OWN, {"10.5.9.0-24": "it overlaps"}))
    assert lines[1].startswith("10.5.8.0/24")
    assert lines[1].endswith(
        "bad: PublicIP 127.0.0.1 is a loopback address: expected the address of the host that holds "
        "10.5.8.0/24"
    )
    assert lines[2].split()[:2] == ["10.5.9.0/24", "192.0.2.9"]
    assert lines[2].endswith("bad: it overlaps")
    assert lines[-1] == "1 lease, 2 bad records at revision 17"


def test_keys_that_name_no_subnet_come_last() -> None:
    lines = shown(listing(Entry("subnets/", b""), Entry("subnets/0junk", b""), TEN))
    assert [line.split()[0] for line in lines[1:4]] == ["10.5.10.0/24", '""', "0junk"]


def test_on_a_narrow_terminal_the_reason_stands_below() -> None:
    lines = shown(listing(BAD, TEN, NINE), Verdict("daemon", OWN, {}, {"10.5.9.0-24": "odd"}), width=80)
    assert lines[1].endswith("  bad")
    assert lines[2].startswith("    PublicIP 127.0.0.1 is a loopback address")
    assert lines[3].startswith("    ")
    assert [line.split()[0] for line in lines[4:7]] == ["10.5.9.0/24", "odd", "10.5.10.0/24"]
    assert all(len(line) <= 80 for line in lines)


def test_what_is_odd_but_harms_nobody() -> None:
    verdict = Verdict("daemon", OWN, {}, {"10.5.9.0-24": "public address 192.0.2.9 is also that of b"})
    lines = shown(listing(TEN, NINE), verdict)
    assert lines[1].endswith("  ok, but public address 192.0.2.9 is also that of b")
    assert lines[-1] == "2 leases, 1 doubtful at revision 17"


def test_a_key_cannot_steer_the_terminal() -> None:
    for width in (None, 80):
        text = "\n".join(shown(listing(Entry("subnets/\x1b[2J\n10.5.1.0-24", b"{}")), width=width))
        assert "\x1b" not in text
        assert "\\x1b[2J\\n10.5.1.0-24" in text


def test_no_leases() -> None:
    assert shown(listing()) == ["no leases below /p/subnets at revision 17"]


def test_each_family_has_its_line() -> None:
    first, second = shown(listing(DUAL))[1:3]
    assert first.split()[:2] == ["10.5.7.0/24", "192.0.2.7"]
    assert second.split() == ["fd00:5::/64", "2001:db8::7"]
    assert second.index("2001:db8::7") == first.index("192.0.2.7")


def test_time_left_only_if_asked_for() -> None:
    assert shown(listing(TEN))[1].split()[-2:] == ["-", "ok"]
    (row,) = as_json(listing(TEN), BY_DAEMON)["leases"]
    assert "ttl" not in row
    rows = as_json(listing(TEN, NINE, DUAL), BY_DAEMON, LIFETIMES)["leases"]
    assert [row["ttl"] for row in rows] == [None, -1, 86_399]


def test_json() -> None:
    reason = (
        "PublicIP 127.0.0.1 is a loopback address: expected the address of the host that holds 10.5.8.0/24"
    )
    assert as_json(listing(TEN, BAD), BY_DAEMON) == {
        "revision": 17,
        "checked_by": "daemon",
        "leases": [
            {
                "key": "10.5.8.0-24",
                "subnets": ["10.5.8.0/24"],
                "public_ips": [],
                "backend": None,
                "vtep_macs": [],
                "node_id": "",
                "etcd_lease": "0",
                "owner": None,
                "own": False,
                "state": "bad",
                "reason": reason,
            },
            {
                "key": "10.5.10.0-24",
                "subnets": ["10.5.10.0/24"],
                "public_ips": ["192.0.2.10"],
                "backend": "vxlan",
                "vtep_macs": [MAC],
                "node_id": OWN,
                "etcd_lease": "1a",
                "owner": "this host",
                "own": True,
                "state": "ok",
                "reason": None,
            },
        ],
        "bad": {"10.5.8.0-24": reason},
    }


# --- who judges -----------------------------------------------------------------------------------


def test_without_a_daemon_the_config_judges() -> None:
    outside = Entry("subnets/10.6.1.0-24", value("192.0.2.6"), etcd_lease=1)
    other = Entry("subnets/10.5.6.0-24", value("192.0.2.6", BackendType="host-gw"), etcd_lease=1)
    found = judge(listing(TEN, outside, other, RESERVED), OWN)
    assert found.rejected == {
        "10.6.1.0-24": "subnet 10.6.1.0/24 lies outside the Network 10.5.0.0/16",
        "10.5.6.0-24": "backend is host-gw, the config's is vxlan",
    }
    assert (found.by, found.own) == ("config", OWN)
    assert shown(listing(TEN), found)[-1].startswith("no daemon answers on this host")


@pytest.mark.parametrize("config", [b"", b"{", b'{"Network":"10.5.0.0/33"}'])
def test_without_a_valid_config_nobody_judges(config: bytes) -> None:
    found = judge(listing(TEN, config=config), "")
    assert found == Verdict()
    assert "there is no valid config" in shown(listing(TEN), found)[-1]


def test_the_daemons_verdict_counts_if_it_is_of_this_prefix(tmp_path: Path) -> None:
    told = {"prefix": "/p", "node_id": OWN, "judged": True, "rejected": {"k": "r"}, "doubtful": {}}
    flags = {"subnet-file": f"{tmp_path}/subnet.env", "etcd-prefix": "/p"}
    answers = {
        "daemon": told,
        "config": told | {"prefix": "/q"},
        "config ": told | {"judged": False},
        "config  ": {"rejected": []},
    }
    for by, answer in answers.items():
        with daemon(tmp_path, peers=lambda answer=answer: answer):  # type: ignore[misc]
            found = find_verdict(resolve(flags, {}, {}), listing(TEN))
        assert found.by == by.strip()
        assert found.rejected == ({"k": "r"} if by == "daemon" else {})
    assert find_verdict(resolve(flags, {}, {}), listing(TEN)).by == "config"


def test_our_node_id_is_that_of_the_same_prefix(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"prefix": "/p", "node_id": OWN}))
    flags = {"subnet-file": f"{tmp_path}/subnet.env"}
    assert own_node_id(resolve({**flags, "etcd-prefix": "/p"}, {}, {})) == OWN
    assert own_node_id(resolve({**flags, "etcd-prefix": "/q"}, {}, {})) == ""
    assert own_node_id(resolve({"subnet-file": f"{tmp_path}/b.env", "etcd-prefix": "/p"}, {}, {})) == ""


# --- waiting --------------------------------------------------------------------------------------

WAIT = """
import time
from flanneld_py.cli.ctl import progress
progress.PATIENCE = 0.05
with progress.waiting_for("etcd http://192.0.2.1:2379"):
    time.sleep(0.2)
with progress.waiting_for("nothing"):
    pass
time.sleep(0.1)
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_on_a_terminal_a_long_wait_is_told(terminal: bool) -> None:
    ours, theirs = pty.openpty() if terminal else os.pipe()
    try:
        subprocess.run([sys.executable, "-c", WAIT], stderr=theirs, check=True, timeout=20)
        os.close(theirs)
        theirs = -1
        try:
            said = os.read(ours, 1000)
        except OSError:  # EIO: nobody holds the other end of the terminal any more
            said = b""
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    expected = b"waiting for etcd http://192.0.2.1:2379 ... (Ctrl-C to give up)\r\n" if terminal else b""
    assert said == expected
