"""One namespace for all tests of a file, and what reads its rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers.nfreader import NfReader
from tests.netns.inside import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns.inside import Agent


@pytest.fixture(scope="module")
def shared_net() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


@pytest.fixture(scope="module")
def agent(shared_net: Namespace) -> Agent:
    return shared_net.agent()


@pytest.fixture
def net(shared_net: Namespace) -> Iterator[Namespace]:
    """Without any rule."""
    yield shared_net
    shared_net.run("nft", "flush", "ruleset")


@pytest.fixture(scope="module")
def reader(agent: Agent) -> NfReader:
    return agent.make(NfReader)
