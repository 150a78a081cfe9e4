"""What befalls etcd, and the way to it: the data plane stands still, and all is well soon after the cure.

With three members: test_registry_cluster.py. A watch that fell behind, a backup that was overtaken:
test_outages.py. All records deleted: test_wipe_hold.py. Users and tokens: test_registry_auth.py.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import CommandFailed, wait_for
from tests.netns.faults.product import on_every_backend, on_vxlan
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.observing import codes, events, start_pings, wait_answers, wait_status
from tests.netns.oracle import actual, own_key, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.registry_history import record_at, revision
from tests.netns.scenes import config, overlay
from tests.netns.test_outages import restore, seconds_between

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flanneld_py.lab import EtcdServer, Host, Lab
    from tests.netns.faults.rows import Matrix

OUTAGES: dict[str, tuple[Callable[[EtcdServer], object], Callable[[EtcdServer], object]]] = {
    "stopped": (lambda etcd: etcd.stop(), lambda etcd: etcd.start()),
    "frozen": (lambda etcd: etcd.pause(), lambda etcd: etcd.resume()),
    "killed": (lambda etcd: etcd.kill(), lambda etcd: etcd.start()),
}
AWAY = {"check": "registry", "says": "unreachable"}
NEW_CONNECTION_WITHIN = 10.0
"""Seconds after which one that leads nowhere has been given up for another."""
SMALL_QUOTA = 1 << 20
"""Bytes."""
STANDS_STILL, RUNS = 0.8, 0.2
"""Seconds that a slow etcd does."""
OLD_OWNER = "10.5.150.0-24"


@on_every_backend
@pytest.mark.parametrize("outage", OUTAGES)
def test_etcd_is_away(lab: Lab, backend: str, outage: str, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    leases = lab.etcd.leases()
    (peer,) = make_peers(lab.etcd, 1)
    end, begin_again = OUTAGES[outage]
    with fault(f"etcd {outage}", backend, expected="all peers stay", **AWAY) as row:
        row.stands(alpha, beta)
        end(lab.etcd)
        row.seen(alpha, beta)
        row.endures()
        begin_again(lab.etcd)
        row.cured()
        change_peers(lab.etcd, backend, put=[peer])
        row.recovered(alpha, beta)
    assert lab.etcd.leases() == leases | {peer.key: peer.record(backend)}


@on_vxlan
def test_etcd_is_frozen_and_the_host_gets_another_address(lab: Lab, backend: str, fault: Matrix) -> None:
    """Then all connections are made anew, and nobody is left to notice the silence."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    key = own_key(alpha)
    with fault(
        "etcd frozen, address changed", backend, expected="told as soon as any silence", **AWAY
    ) as row:
        row.stands(beta, rows=False)
        lab.etcd.pause()
        row.injected()
        alpha.ip("address", "delete", f"{alpha.address}/24", "dev", "eth0")
        alpha.ip("address", "add", "192.0.2.77/24", "dev", "eth0")
        alpha.ip("route", "replace", "default", "via", "192.0.2.254")
        row.seen(alpha)
        lab.etcd.resume()
        row.cured()
        wait_for(
            lambda: lab.etcd.leases()[key]["PublicIP"], 5, "the new address", lambda ip: ip == "192.0.2.77"
        )
        row.recovered(alpha, beta, kernel=False)
    wait_answers(start_pings(beta, alpha))


@on_every_backend
def test_etcd_comes_back_empty(lab: Lab, backend: str, fault: Matrix) -> None:
    """With a config an hour later, as it were; a peer that does not come back stays for the grace."""
    alpha, beta, gamma = hosts = overlay(lab, backend, "alpha", "beta", "gamma", flags=OBSERVED)
    (ghost,) = make_peers(lab.etcd, 1)
    change_peers(lab.etcd, backend, put=[ghost])
    for host in hosts:
        wait_in_order(host, backend)
    leases, env = lab.etcd.leases(), beta.subnet_file.read_bytes()
    ops = {host: host.daemon.status()["drift"]["ops"] for host in hosts}
    expected = "all peers stay; each host claims its subnet again"
    with fault("etcd restarted empty", backend, expected=expected, **AWAY) as row:
        row.stands(alpha, beta, gamma)
        lab.etcd.stop()
        row.seen(*hosts)
        lab.etcd.start(empty=True)
        del leases[ghost.key]
        wait_for(lab.etcd.leases, 5, "every host to be back", lambda seen: seen == leases)
        for host in hosts:
            wait_status(host.daemon, "only the config to be missed", lambda s: codes(s) == ["config-missing"])
            # Pauses between attempts grow, and must not delay what follows the first success.
            assert seconds_between(host.daemon, "registry_relist", "registry_in_sync") < 0.5
        lab.etcd.put_config(config(backend))
        row.recovered(*hosts, kernel=False)
    assert {host: host.daemon.status()["drift"]["ops"] for host in hosts} == ops, "a peer left the kernel"
    assert beta.subnet_file.read_bytes() == env

    rows = actual(alpha, backend)
    beta.daemon.kill()
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{own_key(beta)}")
    gone = {what for what, how in rows.items() if beta.address in what + how}
    assert gone
    wait_for(lambda: actual(alpha, backend), 5, "beta to be gone", lambda seen: not gone & seen.keys())


def put_with_lease(etcd: EtcdServer, key: str, record: dict[str, Any], ttl: int) -> str:
    """Store a record below a new etcd lease; its id."""
    lease = etcd.grant(ttl)
    etcd.ctl("put", f"--lease={lease}", f"{etcd.prefix}/subnets/{key}", json.dumps(record))
    return lease


@on_vxlan
def test_etcd_is_restored_with_the_old_owner_of_our_subnet(
    fresh_lab: Lab, backend: str, tmp_path: Path, fault: Matrix
) -> None:
    """Its revision has gone back, and who had the subnet before us seems to have it."""
    etcd = fresh_lab.etcd
    old = Peer(subnet_of(OLD_OWNER), "192.0.2.199", "0a:00:00:00:00:99").record(backend)
    lease = put_with_lease(etcd, OLD_OWNER, old | {"NodeID": "f" * 32}, 3600)
    etcd.ctl("snapshot", "save", str(tmp_path / "backup"))
    etcd.ctl("lease", "revoke", lease)
    base = subnet_of(OLD_OWNER).partition("/")[0]
    fields = config(backend, Network="10.5.0.0/16", SubnetMin=base, SubnetMax=base)
    etcd.put_config(fields)
    (alpha,) = fresh_lab.add_hosts("alpha")
    fresh_lab.start_daemons(OBSERVED)
    wait_in_order(alpha, backend)
    assert own_key(alpha) == OLD_OWNER
    env = alpha.subnet_file.read_bytes()
    expected = "its subnet is held, the old owner named; claimed as soon as that one ends"
    with fault(
        "etcd restored, an old owner has our subnet",
        backend,
        expected=expected,
        check="lease",
        says="192.0.2.199",
    ) as row:
        row.stands(alpha)
        etcd.stop()
        restore(etcd, tmp_path / "backup")
        etcd.put_config(fields)
        row.injected()
        row.seen(alpha)
        row.endures()
        etcd.ctl("lease", "revoke", lease)
        row.recovered(alpha)
    assert own_key(alpha) == OLD_OWNER
    assert alpha.subnet_file.read_bytes() == env


def port_of_watch(host: Host) -> str:
    """From which the host's daemon is connected with etcd."""
    (line,) = host.run(["ss", "-Htn", "state", "established", "dport = :2379"]).splitlines()
    return line.split()[2].rpartition(":")[2]


@on_vxlan
def test_the_established_connection_leads_nowhere(lab: Lab, backend: str, fault: Matrix) -> None:
    """A firewall between has forgotten it; a new one would do."""
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    (peer,) = make_peers(lab.etcd, 1)
    with fault(
        "established connection black-holed",
        backend,
        expected="another one is made",
        back_within=NEW_CONNECTION_WITHIN,
        **AWAY,
    ) as row:
        row.stands(alpha, beta)
        port = port_of_watch(alpha)
        lab.underlay.drop([f"tcp sport {port}", f"tcp dport {port}"])
        row.cured()
        row.seen(alpha, passes=True)
        change_peers(lab.etcd, backend, put=[peer])
        row.recovered(alpha, beta)
    assert port_of_watch(alpha) != port


@contextmanager
def slow(etcd: EtcdServer) -> Iterator[None]:
    """It stands still for most of each second."""
    over = threading.Event()

    def hamper() -> None:
        while not over.wait(RUNS):
            etcd.pause()
            over.wait(STANDS_STILL)
            etcd.resume()

    thread = threading.Thread(target=hamper)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@on_vxlan
def test_etcd_is_slow(lab: Lab, backend: str, fault: Matrix) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta", flags=OBSERVED)
    peers = make_peers(lab.etcd, 3)
    with fault("etcd slow", backend, expected="changes are followed all the same", check=None) as row:
        row.stands(alpha, beta)
        with slow(lab.etcd):
            for peer in peers:
                change_peers(lab.etcd, backend, put=[peer])
                for host in (alpha, beta):
                    wait_in_order(host, backend, 10)
            row.endures(seconds=5)
        row.recovered(alpha, beta)
    for host in (alpha, beta):
        assert events(host.daemon, "registry_relist") == []


@on_vxlan
def test_etcd_has_no_space_left(fresh_lab: Lab, backend: str, fault: Matrix) -> None:
    """It refuses all writes: who has a lease keeps it far longer than its TTL, who has none is told why."""
    etcd = fresh_lab.etcd
    restart_small(etcd)
    flags = [*OBSERVED, "--subnet-lease-ttl=6s"]
    alpha, beta = overlay(fresh_lab, backend, "alpha", "beta", flags=flags)
    leases = etcd.leases()
    newcomer = fresh_lab.add_host("gamma")
    with fault(
        "etcd has no space left (NOSPACE)",
        backend,
        expected="leases are renewed; a new host waits, and says why",
        check="lease",
        says="database space exceeded",
        back_within=NEW_CONNECTION_WITHIN,
    ) as row:
        row.stands(alpha, beta)
        fill(etcd)
        newcomer.start_daemon(flags)
        wait_status(newcomer.daemon, "the newcomer to come to its lease", lambda s: s["networks"])
        row.injected()
        row.seen(newcomer)
        row.endures(alpha, beta, seconds=9)
        assert etcd.leases() == leases
        make_room(etcd)
        row.recovered(newcomer, alpha, beta)


@on_vxlan
def test_a_lease_is_gone_and_etcd_has_no_space_left(fresh_lab: Lab, backend: str, fault: Matrix) -> None:
    """It cannot be claimed again: that is said once, with the reason, and what stands stays."""
    etcd = fresh_lab.etcd
    restart_small(etcd)
    alpha, beta = overlay(fresh_lab, backend, "alpha", "beta", flags=OBSERVED)
    with fault(
        "lease revoked while etcd has no space left",
        backend,
        expected="the subnet is kept, and claimed again when there is room",
        check="lease",
        says="database space exceeded",
        back_within=NEW_CONNECTION_WITHIN,
    ) as row:
        row.stands(alpha)
        fill(etcd)
        etcd.ctl("lease", "revoke", f"{record_at(etcd, own_key(alpha)).lease:x}")
        row.injected()
        row.seen(alpha)
        row.endures(alpha)
        make_room(etcd)
        row.recovered(alpha, beta)


def restart_small(etcd: EtcdServer) -> None:
    """It has little space from now on."""
    etcd.stop()
    etcd.server_flags = (f"--quota-backend-bytes={SMALL_QUOTA}",)
    etcd.start()


def fill(etcd: EtcdServer) -> None:
    """Until it refuses a write."""
    with suppress(CommandFailed):
        for number in range(64):
            etcd.ctl("put", f"/filler/{number}", text="x" * 100_000)
    assert "NOSPACE" in etcd.ctl("alarm", "list")


def make_room(etcd: EtcdServer) -> None:
    """As etcd's manual has it."""
    etcd.ctl("del", "--prefix", "/filler/")
    etcd.ctl("compact", str(revision(etcd)))
    etcd.ctl("defrag")
    etcd.ctl("alarm", "disarm")
