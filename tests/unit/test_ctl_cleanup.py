"""flannelctl cleanup: what counts as ours, and what is left when it is cut short."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from flanneld_py.addresses import PerFamily
from flanneld_py.cli.ctl.cleanup import (
    ROUNDS,
    Journal,
    Registry,
    StandingLease,
    _remove_files,
    _remove_objects,
    ask_registry,
    scope_of,
    tell_lease,
)
from flanneld_py.cli.ctl.settings import Settings, resolve
from flanneld_py.cli.ctl.traces import OwnFiles, find_traces
from flanneld_py.core.plan import apply_all
from flanneld_py.core.statefile import SavedState, render_state
from flanneld_py.daemon.execute import Executor
from flanneld_py.errors import UsageError
from flanneld_py.model import NextHop, Op, Outcome, Record, Route, Scope, State, Table
from tests.unit.strategies import TABLES

NODE = "a" * 32
NETWORK, SUBNET = ip_network("10.5.0.0/16"), ip_network("10.5.34.0/24")
ENV = f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
PEER = Record("10.5.9.0-24", PerFamily(ip_network("10.5.9.0/24")), PerFamily(ip_address("192.0.2.9")))


@pytest.fixture
def place(tmp_path: Path) -> Settings:
    """Empty run and state directories."""
    for name in ("run", "state"):
        (tmp_path / name).mkdir()
    flags = {"etcd-prefix": "/p", "etcd-endpoints": "http://127.0.0.1:1"}
    flags |= {"subnet-file": f"{tmp_path}/run/subnet.env", "state-dir": f"{tmp_path}/state"}
    return resolve(flags, {}, {})


def save(place: Settings, prefix: str = "/p") -> None:
    place.state_file.write_text(render_state(SavedState(prefix, NODE, (NETWORK,), PerFamily(SUBNET))))


def write_status(place: Settings, **status: Any) -> None:
    place.status_file.write_text(json.dumps({"prefix": "/p", "node_id": NODE, "networks": [], **status}))


# --- traces ---------------------------------------------------------------------------------------


def test_nothing_there(place: Settings) -> None:
    traces = find_traces(place)
    assert not traces.daemon_ran
    assert (traces.node_id, list(traces.networks), traces.subnet_env) == ("", [], None)


def test_networks_of_every_trace(place: Settings) -> None:
    save(place)
    write_status(place, networks=["10.6.0.0/16", "rubbish"])
    place.subnet_file.write_text(ENV.replace("10.5.0.0", "10.4.0.0"))
    traces = find_traces(place)
    assert [str(net) for net in traces.networks] == ["10.5.0.0/16", "10.4.0.0/16", "10.6.0.0/16"]
    assert traces.node_id == NODE


def test_a_subnet_file_without_any_trace_of_ours_is_another_programs(place: Settings) -> None:
    place.subnet_file.write_text(ENV)
    traces = find_traces(place)
    assert traces.subnet_env is None
    assert scope_of(place, traces, Registry(networks=(NETWORK,), records=(PEER,))) == Scope("/p", ())


def test_a_subnet_file_of_our_last_lease_is_ours(place: Settings) -> None:
    save(place)
    place.subnet_file.write_text(ENV)
    assert find_traces(place).subnet_env is not None
    place.subnet_file.write_text(ENV.replace("10.5.34.1", "10.5.35.1"))
    assert find_traces(place).subnet_env is None, "another daemon's subnet"
    write_status(place)
    assert find_traces(place).subnet_env is not None, "our daemon's status lies beside it"


@pytest.mark.parametrize("name", ["state", "status"])
def test_the_files_of_another_prefix_are_refused(place: Settings, name: str) -> None:
    if name == "state":
        save(place, prefix="/q")
    else:
        write_status(place, prefix="/q\x1b")
    with pytest.raises(UsageError, match=r"--etcd-prefix /q(\\x1b)?, not /p"):
        find_traces(place)


def test_damaged_networks_are_no_traceback(place: Settings) -> None:
    damaged: tuple[Any, ...] = (5, None, {}, [5, None, ["10.6.0.0/16"]], "10.6.0.0/16")
    for networks in damaged:
        write_status(place, networks=networks)
        assert list(find_traces(place).networks) == []
    write_status(place, prefix=7)
    assert not find_traces(place).daemon_ran
    for text in ("[" * 100_000, '{"prefix": ' * 100_000):
        place.status_file.write_text(text)
        place.state_file.write_text(text)
        assert not find_traces(place).daemon_ran


def test_a_fifo_in_the_place_of_a_file_holds_nobody_up(place: Settings) -> None:
    for path in (place.status_file, place.state_file, place.subnet_file):
        os.mkfifo(path)
    assert not find_traces(place).daemon_ran


def test_damaged_files_are_no_trace(place: Settings) -> None:
    place.state_file.write_text("{}")
    place.status_file.write_text('{"of": "somebody else"}')
    assert not find_traces(place).daemon_ran
    assert OwnFiles(place).files(status_is_ours=False) == [place.state_file]


# --- scope ----------------------------------------------------------------------------------------


def test_the_scope_after_a_run(place: Settings) -> None:
    save(place)
    place.subnet_file.write_text(ENV)
    registry = Registry(networks=(ip_network("10.7.0.0/16"),), records=(PEER,))
    assert scope_of(place, find_traces(place), registry) == Scope(
        prefix="/p",
        networks=(NETWORK, ip_network("10.7.0.0/16")),
        adoptable={ip_network("10.5.9.0/24"): frozenset(map(ip_address, ("10.5.9.0", "192.0.2.9")))},
        files=frozenset({str(place.subnet_file)}),
    )


# --- the lease ------------------------------------------------------------------------------------


def test_what_becomes_of_the_lease(place: Settings) -> None:
    save(place)
    traces = find_traces(place)
    standing = Registry(lease=StandingLease("/p/subnets/10.5.34.0-24", 86_340))
    assert tell_lease(place, traces, standing, NOW) == [
        "/p/subnets/10.5.34.0-24 stays in etcd until 2026-01-03 11:59:00 UTC (for 23 h 59 min)"
    ]
    reserved = Registry(lease=StandingLease("/p/subnets/10.5.34.0-24", None))
    assert "does not end" in tell_lease(place, traces, reserved, NOW)[0]
    assert tell_lease(place, traces, Registry(), NOW) == []


def test_an_unreachable_registry_is_said_and_no_obstacle(place: Settings) -> None:
    save(place)
    registry = ask_registry(place, NODE)
    assert registry.records == registry.networks == ()
    (line,) = tell_lease(place, find_traces(place), registry, NOW)
    assert "http://127.0.0.1:1: connection refused" in line
    assert "/p/subnets/10.5.34.0-24 stays there until it ends by itself" in line


def test_wrong_tls_files_are_no_obstacle(place: Settings) -> None:
    settings = resolve({"etcd-endpoints": "https://127.0.0.1:1", "etcd-cafile": "/absent"}, {}, {})
    registry = ask_registry(settings, NODE)
    (line,) = tell_lease(settings, find_traces(place), registry, NOW)
    assert "/absent" in line
    assert "a lease of this host stays there" in line


# --- objects --------------------------------------------------------------------------------------

HOP = NextHop("eth0", ip_address("192.0.2.9"), onlink=False)
FULL = State(routes={SUBNET: Route(HOP)}, nexthops={HOP: True}, files={"/run/x": "text"})


class InMemory:
    """All tables as one State; rows whose table is in `stubborn` are refused, or come back."""

    tables = TABLES

    def __init__(self, *, refuses: Table | None = None, remakes: Table | None = None) -> None:
        self.state = FULL
        self.refuses, self.remakes = refuses, remakes

    def observe(self, _scope: Scope) -> State:
        return self.state

    def apply(self, ops: Sequence[Op]) -> list[Outcome]:
        outcomes = [Outcome(op, "refused" if op.table == self.refuses else None) for op in ops]
        done = [op for op, error in outcomes if error is None and op.table != self.remakes]
        self.state = apply_all(self.state, done)
        return outcomes


LINES = [
    "del file /run/x",
    "del route 10.5.34.0/24",
    "del nexthop via 192.0.2.9 dev eth0",
]


def removal(kernel: InMemory, *, dry_run: bool = False) -> Journal:
    journal = Journal(dry_run=dry_run, quiet=True)
    _remove_objects(Executor((kernel,)), Scope("/p", ()), journal)
    return journal


def test_everything_is_removed_and_told_in_order() -> None:
    kernel = InMemory()
    journal = removal(kernel)
    assert (journal.removed, journal.failed, kernel.state) == (LINES, {}, State())


def test_a_dry_run_tells_the_same_and_does_nothing() -> None:
    kernel = InMemory()
    assert removal(kernel, dry_run=True).removed == LINES
    assert kernel.state == FULL


def test_a_reader_that_leaves_stops_nothing() -> None:
    kernel, (read, write) = InMemory(), os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as gone, redirect_stdout(gone):
        _remove_objects(Executor((kernel,)), Scope("/p", ()), Journal(dry_run=False, quiet=False))
        # What is still buffered for the gone reader must not fail the test when the file is closed.
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), gone.fileno())
    assert kernel.state == State()


def test_what_is_refused_is_told_once_and_holds_up_nothing_else() -> None:
    journal = removal(InMemory(refuses="routes"))
    assert journal.removed == [LINES[0], LINES[2]]
    assert journal.failed == {LINES[1]: "refused"}


def test_what_comes_back_is_given_up() -> None:
    journal = removal(InMemory(remakes="routes"))
    assert journal.removed.count(LINES[1]) == ROUNDS
    assert journal.failed == {LINES[1]: "was made again by somebody; stop that first"}


# --- files ----------------------------------------------------------------------------------------


def leave_everything(place: Settings) -> None:
    save(place)
    write_status(place)
    place.subnet_file.write_text(ENV)
    (place.state_dir / "node-id").write_text(NODE)
    (place.state_dir / "lock").touch()
    (place.state_dir / ".state.json.0123abcd").write_text("half")
    (place.subnet_file.parent / ".subnet.env.0123abcd").write_text("half")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.control_socket))


def files_removed(place: Settings, *, dry_run: bool = False) -> Journal:
    journal = Journal(dry_run=dry_run, quiet=True)
    files = OwnFiles(place)
    if not dry_run:
        place.subnet_file.unlink(missing_ok=True)  # as the driver does
    _remove_files(files, find_traces(place).status is not None, [place.subnet_file], journal)
    return journal


def test_all_own_files_go_those_that_tell_what_is_ours_last(place: Settings) -> None:
    leave_everything(place)
    foretold = files_removed(place, dry_run=True)
    journal = files_removed(place)
    assert journal.removed == foretold.removed
    assert journal.failed == {}
    names = [Path(line.split()[-1]).name for line in journal.removed]
    assert names.index("status.json") < names.index("state.json")
    assert names[-4:] == ["state.json", "lock", "run", "state"]
    assert not place.state_dir.exists()
    assert not place.subnet_file.parent.exists()


def test_what_others_put_there_stays_and_so_does_its_directory(place: Settings) -> None:
    leave_everything(place)
    strangers = [
        place.state_dir / "notes.txt",
        place.subnet_file.parent / "docker_opts.env",
        place.subnet_file.parent / ".subnet.env.swp",
        place.subnet_file.parent / ".subnet.env1234567",
    ]
    for path in strangers:
        path.touch()
    journal = files_removed(place)
    assert not any("directory" in line for line in journal.removed)
    assert sorted([*place.state_dir.iterdir(), *place.subnet_file.parent.iterdir()]) == sorted(strangers)


def test_empty_directories_that_held_nothing_of_ours_stay(place: Settings) -> None:
    assert files_removed(place).removed == [f"del directory {place.subnet_file.parent}"]
    place.subnet_file.parent.mkdir()
    journal = Journal(dry_run=False, quiet=True)
    _remove_files(OwnFiles(place), False, [], journal)
    assert journal.removed == []


def test_what_the_lock_made_goes_without_a_word(place: Settings) -> None:
    place.state_dir.rmdir()
    files = OwnFiles(place)
    place.state_dir.mkdir()
    (place.state_dir / "lock").touch()
    assert files.files(status_is_ours=False) == []
    files.remove_what_the_lock_made()
    assert not place.state_dir.exists()


def test_a_lock_that_stood_before_is_not_the_locks_doing(place: Settings) -> None:
    (place.state_dir / "lock").touch()
    files = OwnFiles(place)
    files.remove_what_the_lock_made()
    assert files.files(status_is_ours=False) == [place.state_dir / "lock"]


def test_a_file_in_the_place_of_the_socket_is_not_ours(place: Settings) -> None:
    place.control_socket.write_text("mine")
    assert OwnFiles(place).files(status_is_ours=True) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for an immutable directory")
def test_what_cannot_be_deleted_is_reported(place: Settings) -> None:
    save(place)
    os.system(f"chattr +i {place.state_dir}")  # noqa: S605
    try:
        journal = files_removed(place)
    finally:
        os.system(f"chattr -i {place.state_dir}")  # noqa: S605
    assert list(journal.failed) == [f"del file {place.state_file}"]
