"""An earlier run's state without etcd: what is thought of it, how it is told, what is kept for the next."""

from __future__ import annotations

import threading
from ipaddress import IPv4Network, ip_interface
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily, Subnets
from flanneld_py.core.leasedecision import Wish
from flanneld_py.core.registrycache import Cached, Known, Origin, digest_of, parse, render, render_end
from flanneld_py.daemon import registrymemory
from flanneld_py.daemon.checks import ready_checks
from flanneld_py.daemon.inbox import Inbox, LeaseState, Levels, Recalled, RegistryState, utc_text
from flanneld_py.daemon.leaseground import Ground, LastRun, complete_wish
from flanneld_py.daemon.oldfiles import ASIDE
from flanneld_py.daemon.recall import doubts, is_machine_of, seconds_left
from flanneld_py.daemon.registrymemory import RegistryMemory
from flanneld_py.daemon.status import compose, may_start, one_line
from flanneld_py.lab import wait_for
from flanneld_py.model import AddressFacts, Entry, HostFacts, LinkFacts, OwnLease, Record, Snapshot
from tests.unit.strategies import PREFIX, host, underlay
from tests.unit.test_status import OWN, PEER, PROCESS, WELL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIME = 1795000000.0
AT = "2026-11-18T11:06:40Z"
DAY = 86_400
RECALLED = Recalled(OwnLease(OWN, DAY), TIME)
OUTAGE = RegistryState("unreachable", "http://192.0.2.9:2379", "connection refused", began=4999.0)
OFFLINE = replace(
    WELL, registry=OUTAGE, recalled=RECALLED, lease=LeaseState("held", RECALLED.own, recalled=True)
)
"""All is set up by an earlier run's state."""


# --- doubts ---------------------------------------------------------------------------------------


def test_a_lease_that_may_have_ended_is_named_and_no_other() -> None:
    assert doubts(RECALLED, host(1), TIME + DAY - 1) is None
    told = doubts(RECALLED, host(1), TIME + DAY)
    assert told is not None
    assert told.code == "lease-unconfirmed"
    assert f"is of {AT}, and a lease stands for 1 d, so another host may have its subnet" in told.reason
    assert "--on-lease-loss" in told.fix
    reservation = replace(RECALLED, own=OwnLease(OWN, 0))
    assert doubts(reservation, host(1), TIME + 99 * DAY) is None
    assert doubts(reservation, host(1), 0) is None


@pytest.mark.parametrize("years", [1, 50])
def test_a_clock_that_was_turned_back_tells_nothing(years: int) -> None:
    told = doubts(RECALLED, host(1), TIME - years * 365 * DAY)
    assert told is not None
    assert f"this host's clock is behind {AT}" in told.reason
    assert seconds_left(RECALLED, TIME - 1) is None


def test_another_address_than_peers_send_to_is_named() -> None:
    told = doubts(RECALLED, host(9), TIME + 1)
    assert told is not None
    assert "peers know this host by 192.0.2.1, and send there; it now has 192.0.2.9" in told.reason
    # Of a family that the lease does not have nobody need know.
    assert doubts(RECALLED, host(1, (4, 6)), TIME + 1) is None


def test_times_that_are_none_are_no_errors() -> None:
    assert utc_text(TIME) == AT
    assert utc_text(1e300) == utc_text(-1e300) == "an unknown time"


# --- the machine ----------------------------------------------------------------------------------


def facts(mac: str, address: int) -> HostFacts:
    held = AddressFacts(ip_interface(f"{underlay(4, address)}/24"))
    link = LinkFacts("eth0", 2, 1500, mac, up=True, addresses=(held,))
    lo = LinkFacts("lo", 1, 65536, "00:00:00:00:00:00", up=True)
    return HostFacts((lo, link))


def test_a_copy_on_another_machine_is_none() -> None:
    mine = "02:00:00:00:00:01"
    assert is_machine_of(mine, OWN, facts(mine, 7)), "its address may have changed"
    assert not is_machine_of(mine, OWN, facts("02:00:00:00:00:02", 1)), "as may a clone's"


@pytest.mark.parametrize("mac", ["", "00:00:00:00:00:00"])
def test_without_a_mac_the_address_tells(mac: str) -> None:
    assert is_machine_of(mac, OWN, facts("02:00:00:00:00:02", 1))
    assert not is_machine_of(mac, OWN, facts("00:00:00:00:00:00", 2))


# --- the lease when etcd answers ------------------------------------------------------------------


def held_then(lease: LeaseState, *records: Record) -> Record | None:
    """What the decision on our lease takes for held by this process."""
    network = WELL.network
    assert network is not None
    snapshot = Snapshot(5000, 1, {record.key: record for record in records})
    ground = Ground(network, host(1), snapshot, lease)
    return complete_wish(Wish("", PerFamily()), ground, LastRun()).held


def test_a_record_that_was_written_since_is_ours_by_what_proves_it_at_every_start() -> None:
    """As held by this process it would have to be as this process has seen it, or be a clone's."""
    own = replace(OWN, node_id=host(1).node_id, mod_revision=7)
    recalled = LeaseState("held", OwnLease(own, DAY), recalled=True)
    confirmed = replace(recalled, recalled=False)
    written_since = replace(own, mod_revision=8)
    assert held_then(recalled, own) is held_then(recalled, written_since) is None
    assert held_then(recalled) == own, "lost, so --on-lease-loss has a say"
    assert held_then(recalled, replace(own, node_id="another")) == own
    assert held_then(confirmed, written_since) == own


# --- what is told ---------------------------------------------------------------------------------


def test_containers_may_start_and_the_registry_check_fails_at_once() -> None:
    checks = {check.name: check for check in ready_checks(OFFLINE, 5000.0)}
    assert [name for name, check in checks.items() if not check.ok] == ["registry"]
    assert checks["registry"].line(5000.0) == (
        f"[-] registry: unreachable, running on state of {AT} for 1 s: connection refused"
    )
    assert checks["lease"].reason == "held 10.5.1.0/24, not confirmed by etcd yet"
    found = compose(OFFLINE, PROCESS, now=5000.0)
    assert (found["ready"], found["state"], may_start(found)) == (False, "degraded", True)
    assert found["registry"]["running_on_state_of"] == AT
    (problem,) = found["problems"]
    assert (problem["code"], problem["reason"]) == (
        "registry-unreachable",
        f"running on state of {AT}: connection refused",
    )
    assert one_line(found) == f"degraded: running on state of {AT}: connection refused"


def test_an_etcd_that_has_answered_must_confirm_the_lease_before_anything_may_start() -> None:
    levels = replace(OFFLINE, registry=WELL.registry, recalled=None)
    assert [check.name for check in ready_checks(levels, 5000.0) if not check.ok] == ["lease"]
    assert not may_start(compose(levels, PROCESS, now=5000.0))


# --- what is kept ---------------------------------------------------------------------------------

CONFIG = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
SYNCED = replace(
    WELL,
    lease=replace(WELL.lease, own=OwnLease(OWN, DAY)),
    report=replace(WELL.report, snapshot=WELL.snapshot),
)


class Memory:
    """The thread at work on a file."""

    def __init__(self, path: Path, cached: Cached | None = None, leased: Subnets | None = None) -> None:
        self.inbox, self.path = Inbox(), path
        self.inbox.counts.synced()
        self.recalls: list[tuple[Snapshot, Entry, Recalled]] = []
        self.memory = RegistryMemory(
            self.inbox, path, cached, self.recall, lambda: CONFIG, leased or PerFamily()
        )
        self.thread = threading.Thread(target=self.memory.run)

    def recall(self, snapshot: Snapshot, entry: Entry, recalled: Recalled) -> bool:
        self.recalls.append((snapshot, entry, recalled))
        self.inbox.offer(snapshot=snapshot, recalled=recalled)
        return True

    def offer(self, levels: Levels) -> None:
        self.inbox.offer(
            **{name: getattr(levels, name) for name in Levels.__struct_fields__ if name != "memory_problem"}
        )

    def look(self) -> Cached:
        return parse(self.path.read_text())

    def stop(self) -> None:
        self.inbox.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    monkeypatch.setattr(registrymemory, "WRITE_EVERY", 0.05)
    monkeypatch.setattr(registrymemory, "FIRST_AFTER", 0.0)
    memory = Memory(tmp_path / "registry")
    memory.thread.start()
    yield memory
    memory.stop()


def inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def test_what_was_set_up_is_kept_and_nobody_else_may_read_it(memory: Memory) -> None:
    memory.offer(SYNCED)
    wait_for(memory.path.exists, 5, "the file")
    cached = memory.look()
    assert (cached.own, cached.config, cached.ttl) == (OWN.key, CONFIG, DAY)
    assert cached.origin == Origin(PREFIX, host(1).node_id, host(1).external.mac)
    assert cached.last_peers.peers.records.keys() == {PEER.key}
    assert memory.path.stat().st_mode & 0o777 == 0o600


def test_without_a_change_nothing_is_written(memory: Memory) -> None:
    memory.offer(SYNCED)
    first = wait_for(lambda: inode(memory.path), 5, "the file")
    snapshot = SYNCED.snapshot
    assert snapshot is not None
    for revision in range(5000, 5020):
        other = replace(snapshot, revision=revision)
        memory.offer(
            replace(SYNCED, snapshot=other, report=replace(SYNCED.report, snapshot=other, passes=revision))
        )
        memory.inbox.pause(0.01)
    memory.stop()
    assert inode(memory.path) == first


def test_what_an_earlier_run_knew_is_never_kept_as_what_etcd_says(memory: Memory) -> None:
    memory.offer(replace(OFFLINE, report=replace(WELL.report, snapshot=WELL.snapshot)))
    memory.inbox.pause(0.2)
    memory.stop()
    assert not memory.path.exists()


def test_a_lease_that_is_not_ours_any_more_is_not_kept_as_ours(memory: Memory) -> None:
    anothers = replace(OWN, node_id="ab" * 16, create_revision=4712, mod_revision=4712)
    lost = Snapshot(4712, 1, {PEER.key: PEER, OWN.key: anothers})
    memory.offer(replace(SYNCED, snapshot=lost, report=replace(SYNCED.report, snapshot=lost)))
    wait_for(memory.path.exists, 5, "the file")
    assert memory.look().own == ""
    assert not Memory(memory.path, memory.look()).memory.may_recall


def test_while_a_lease_is_claimed_again_what_was_known_of_it_is_kept(memory: Memory) -> None:
    memory.offer(SYNCED)
    wait_for(memory.path.exists, 5, "the file")
    lost = Snapshot(4712, 1, {PEER.key: PEER})
    memory.offer(replace(SYNCED, snapshot=lost, report=replace(SYNCED.report, snapshot=lost)))
    memory.stop()
    assert memory.look().own == OWN.key


@pytest.mark.usefixtures("here")
def test_a_state_of_an_earlier_lease_is_put_aside(tmp_path: Path) -> None:
    """The lease's own file is written at once, this one seconds later."""
    path = tmp_path / "registry"
    later: Subnets = PerFamily(IPv4Network("10.5.99.0/24"))
    memory = Memory(path, cached_here(MAC), later)
    path.touch()
    memory.thread.start()
    memory.inbox.offer(registry=OUTAGE)
    wait_for(path.with_name(f"registry{ASIDE}").exists, 5, "it to be put aside")
    memory.stop()
    assert memory.recalls == []


def test_a_disk_that_refuses_is_named_once_and_tried_again(memory: Memory) -> None:
    memory.path.mkdir()
    memory.offer(SYNCED)
    problem = wait_for(lambda: memory.inbox.levels.memory_problem, 5, "the problem")
    assert problem is not None
    assert problem.code == "state-not-saved"
    assert str(memory.path) in problem.reason
    memory.path.rmdir()
    wait_for(lambda: memory.inbox.levels.memory_problem is None, 5, "the problem to end")
    assert memory.look().own == OWN.key


# --- what is recalled -----------------------------------------------------------------------------


MAC = "02:00:00:00:00:01"


def cached_here(mac: str, config: str = CONFIG) -> Cached:
    known = Known(
        Origin(PREFIX, "node-1", mac),
        config,
        OWN.key,
        DAY,
        Snapshot(9, 1, {OWN.key: OWN, PEER.key: PEER}),
        (PEER,),
    )
    lines = "".join(render(known))
    return parse(lines + render_end(digest_of(lines), 9, TIME))


def started(path: Path, cached: Cached) -> Memory:
    path.write_text("what stands there")
    memory = Memory(path, cached)
    memory.thread.start()
    return memory


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has an interface with MAC: the one that tests run on may have none at all."""
    monkeypatch.setattr(registrymemory, "read_host", lambda: facts(MAC, 1))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("state", ["connecting", "unreachable", "refused"])
def test_it_is_gone_by_when_etcd_fails_or_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(registrymemory, "RECALL_AFTER", 0.3)
    memory = started(tmp_path / "registry", cached_here(MAC))
    assert memory.memory.may_recall
    memory.inbox.offer(registry=RegistryState(state))  # type: ignore[arg-type]
    ((snapshot, entry, recalled),) = wait_for(lambda: memory.recalls, 5, "the state")
    memory.stop()
    assert (set(snapshot.records), snapshot.records[OWN.key]) == ({OWN.key, PEER.key}, OWN)
    assert (entry.value.decode(), recalled) == (CONFIG, RECALLED)


@pytest.mark.usefixtures("here")
def test_an_etcd_that_answers_is_all_there_is_to_go_by(tmp_path: Path) -> None:
    memory = started(tmp_path / "registry", cached_here(MAC))
    memory.offer(WELL)
    wait_for(lambda: not memory.memory.may_recall, 5, "it to be dropped")
    memory.stop()
    assert memory.recalls == []


@pytest.mark.usefixtures("here")
def test_another_machines_is_put_aside_once_it_is_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrymemory, "ARRIVES_WITHIN", 2.0)
    path = tmp_path / "registry"
    memory = started(path, cached_here("02:fe:fe:fe:fe:fe"))
    memory.inbox.offer(registry=OUTAGE)
    memory.inbox.pause(1.0)
    assert path.exists(), "an interface may still come"
    memory.inbox.offer(host=host(1))
    assert path.exists(), "it may be another one that came first"
    wait_for(path.with_name(f"registry{ASIDE}").exists, 5, "it to be put aside")
    memory.stop()
    assert not path.exists()
    assert memory.recalls == []


@pytest.mark.parametrize(
    "config",
    [
        "{",
        '{"Network":"10.5.0.0/16","Backend":{"Type":"of-a-later-version"}}',
        '{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}',
        '{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}',
    ],
)
def test_a_config_that_cannot_be_carried_out_is_put_aside(tmp_path: Path, config: str) -> None:
    path = tmp_path / "registry"
    memory = started(path, cached_here(MAC, config))
    memory.inbox.offer(registry=OUTAGE)
    wait_for(path.with_name(f"registry{ASIDE}").exists, 5, "it to be put aside")
    memory.stop()
    assert memory.recalls == []
