"""Both monitors, of routing and of rules, wait in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.drivers.monitor import Monitor
from flanneld_py.drivers.nfmonitor import NfMonitor
from tests.netns import inside
from tests.netns.inside import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

SOON = 5.0
"""Seconds within which what was done before must be heard."""


@pytest.fixture(params=[Monitor, NfMonitor])
def listening(request: pytest.FixtureRequest) -> Iterator[tuple[inside.Agent, Any]]:
    """A process in a namespace, and its monitor."""
    with Namespace() as namespace:
        agent = namespace.agent()
        yield agent, agent.make(request.param)


@pytest.mark.parametrize("action", ["interrupt", "close"])
def test_a_wait_can_be_ended_from_another_thread(listening: tuple[inside.Agent, Any], action: str) -> None:
    agent, monitor = listening
    heard, seconds = agent.call(inside.after, 0.05, monitor, action)
    assert heard is None
    assert seconds < SOON


def test_an_interrupt_is_not_lost_and_a_closed_monitor_stays_quiet(
    listening: tuple[inside.Agent, Any],
) -> None:
    _, monitor = listening
    monitor.interrupt()
    monitor.interrupt()
    assert monitor.wait(60) is None
    assert monitor.wait(0.01) is None
    monitor.close()
    monitor.close()
    monitor.interrupt()
    assert monitor.wait(60) is None
