"""subnet.env removed or overwritten: noticed and put back; what we write ourselves is no fault."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from flanneld_py.daemon.inbox import Inbox, Report
from flanneld_py.daemon.subnetfile import SubnetFileWatch

WRITTEN = Report(passes=1, subnet_file_written=True, subnet_env="FLANNEL_MTU=1450\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "subnet.env"
    file.write_text(WRITTEN.subnet_env)
    return file


@pytest.fixture
def inbox() -> Inbox:
    made = Inbox()
    made.offer(report=WRITTEN)
    return made


def reason(inbox: Inbox) -> str:
    problem = inbox.levels.subnet_file_problem
    return problem.reason if problem else ""


def test_as_written(path: Path, inbox: Inbox) -> None:
    SubnetFileWatch(path, inbox).look()
    assert (reason(inbox), inbox.levels.kernel_changes) == ("", 0)


def test_missing_is_told_once_and_asked_to_be_put_back(path: Path, inbox: Inbox) -> None:
    watch = SubnetFileWatch(path, inbox)
    path.unlink()
    watch.look()
    watch.look()
    assert (reason(inbox), inbox.levels.kernel_changes) == (f"{path} is missing", 1)
    path.write_text(WRITTEN.subnet_env)
    watch.look()
    assert (reason(inbox), inbox.levels.kernel_changes) == ("", 1)


def test_other_content_counts_when_a_pass_has_not_put_it_right(path: Path, inbox: Inbox) -> None:
    watch = SubnetFileWatch(path, inbox)
    path.write_text("FLANNEL_MTU=9000\n")
    watch.look()
    watch.look()
    assert (reason(inbox), inbox.levels.kernel_changes) == ("", 1)
    inbox.offer(report=replace(WRITTEN, passes=2))
    watch.look()
    assert reason(inbox) == f"{path} holds something else than we wrote"


def test_what_we_have_just_written_ourselves_is_no_fault(path: Path, inbox: Inbox) -> None:
    watch = SubnetFileWatch(path, inbox)
    path.write_text("FLANNEL_MTU=9000\n")
    watch.look()
    inbox.offer(report=replace(WRITTEN, passes=2, subnet_env="FLANNEL_MTU=9000\n"))
    watch.look()
    assert reason(inbox) == ""


def test_before_it_was_written_there_is_nothing_to_miss(path: Path) -> None:
    path.unlink()
    inbox = Inbox()
    SubnetFileWatch(path, inbox).look()
    assert (reason(inbox), inbox.levels.kernel_changes) == ("", 0)


def test_something_in_its_place_that_cannot_be_read(path: Path, inbox: Inbox) -> None:
    path.unlink()
    path.mkdir()
    SubnetFileWatch(path, inbox).look()
    assert reason(inbox) == f"{path} cannot be read: Is a directory"
