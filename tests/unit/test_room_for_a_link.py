"""A device of ours that was renamed stands in the way of the one that is wanted, by its VNI."""

from __future__ import annotations

from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from flanneld_py.core.plan import plan
from flanneld_py.daemon import reconciler
from flanneld_py.daemon.inbox import Inbox
from flanneld_py.model import State, VxlanLink

LINK = VxlanLink(
    vni=1, port=8472, dev="eth0", local=ip_address("192.0.2.1"), mtu=1450, mac="02:00:00:00:00:01", alias="a"
)
WANT, HAVE = State(links={"flannel.1": LINK}), State(links={"gone1": LINK})


@pytest.mark.parametrize("apart", [0.005, -0.005, 0.0])
def test_it_is_removed_whenever_the_other_is_tried(apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone fails, so tried at different times they would keep each other from it without end."""
    nothing: Any = SimpleNamespace(is_standing=lambda *_: False)
    made = reconciler.Reconciler(nothing, nothing, Inbox(), lambda _: None)
    ops = plan(WANT, HAVE)
    assert [(op.verb, op.key) for op in ops] == [("del", "gone1"), ("set", "flannel.1")]
    made._retry.failed(("set", "links", "flannel.1"), 100.0)
    made._retry.failed(("del", "links", "gone1"), 100.0 + apart)
    for now, tried in ((100.999, []), (101.001, ops)):
        monkeypatch.setattr(reconciler, "boottime", lambda now=now: now)
        due, held = made._divide(ops, WANT, HAVE)
        assert (due, held) == (tried, [op for op in ops if op not in tried])
