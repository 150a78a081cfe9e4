"""For tests with real hosts: every test here is marked netns and gets a lab of its own at no cost."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import EtcdServer, Lab, wait_for
from tests.netns.etcd_servers import PREFIX, Etcd
from tests.netns.faults.rows import Matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from flanneld_py.drivers.etcd import EtcdRegistry

_HERE = Path(__file__).parent
_prefixes = (f"/test/{number}/network" for number in itertools.count(1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.netns)
            if "fault" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.fault)
            if item.path.name.startswith("test_udp_"):
                item.add_marker(pytest.mark.pump)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the daemons' logs and status with a failure."""
    report = yield
    if report.failed:
        arguments: dict[str, object] = getattr(item, "funcargs", {})
        for lab in arguments.values():
            if isinstance(lab, Lab):
                report.sections.extend(lab.report())
    return report


@pytest.fixture(scope="session")
def session_lab() -> Iterator[Lab]:
    """The underlay and the etcd that all tests share, one after the other."""
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(session_lab: Lab) -> Iterator[Lab]:
    """No hosts, a running etcd and a prefix in it that nobody has used.

    Afterwards hosts and probes are removed and whatever then still runs fails the test.
    """
    session_lab.clear(next(_prefixes))
    yield session_lab
    session_lab.clear()
    wait_for(session_lab.leftovers, 2, "nothing to be left over", lambda left: not left)


@pytest.fixture
def etcd(lab: Lab) -> EtcdServer:
    """The lab's etcd, for tests that need no hosts."""
    return lab.etcd


@pytest.fixture
def fresh_lab(session_lab: Lab) -> Iterator[Lab]:  # noqa: ARG001 - it knows whether there can be a lab
    """A lab with an etcd of its own, for tests that change what others would meet: users, members, quota."""
    with Lab() as lab:
        yield lab
    assert not lab.workspace.directory.exists()


# --- the fault matrix -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fault(request: pytest.FixtureRequest, figure: Callable[[str], None]) -> Matrix:
    """Makes rows of the table of faults, which are used as faults/rows.py says.

    The arguments of each are the fault's name and the backend, as the table shows them; `expected`: what
    holds, in a few words; `check`: the one of /readyz that tells of it (None: it is over before one can),
    `says`: part of what it then says, `logged`: part of the log line if that is another; `told_within` and
    `back_within`: seconds.
    """
    rows: str | None = request.config.getoption("rows")
    return Matrix(Path(rows) if rows else None, figure)


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether everything was asked for (`--full`), and not what CI has time for."""
    return bool(request.config.getoption("full"))


# --- etcd on loopback, for tests of its driver ----------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> Iterator[Etcd]:
    """For tests that do it no harm, or each under a prefix of its own."""
    with Etcd() as server:
        yield server.start()


@pytest.fixture
def servers() -> Iterator[Callable[..., Etcd]]:
    """Makes servers that a test may ill-treat; they end with it."""
    with ExitStack() as stack:
        yield lambda *options, **more: stack.enter_context(Etcd(*options, **more))


@pytest.fixture
def connect() -> Iterator[Callable[..., EtcdRegistry]]:
    """Makes registries of endpoints, a prefix and further settings; closes them."""
    # gRPC is slow to import, and few tests need it.
    from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings  # noqa: PLC0415

    with ExitStack() as stack:

        def make(*endpoints: str, prefix: str = PREFIX, **more: str) -> EtcdRegistry:
            registry = EtcdRegistry(EtcdSettings(endpoints, prefix, **more))
            stack.callback(registry.close)
            return registry

        yield make
