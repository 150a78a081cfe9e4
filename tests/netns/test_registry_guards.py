"""Guarded writes of more than one key, against a real etcd."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest

from flanneld_py.errors import LeaseGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.drivers.etcd import EtcdRegistry
    from tests.netns.etcd_servers import Etcd


@pytest.fixture
def prefix() -> str:
    return f"/{secrets.token_hex(4)}"


@pytest.fixture
def registry(shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str) -> EtcdRegistry:
    return connect(shared.url, prefix=prefix)


def keys(registry: EtcdRegistry) -> dict[str, tuple[bytes, int]]:
    return {entry.key: (entry.value, entry.etcd_lease) for entry in registry.list().entries}


def test_a_move_is_one_revision_and_keeps_the_etcd_lease(registry: EtcdRegistry) -> None:
    lease = registry.grant(60)
    old = registry.create("subnets/a", "before", lease)
    moved = registry.move("subnets/a", old.revision, "subnets/b", "after", lease)
    assert moved.ok
    assert keys(registry) == {"subnets/b": (b"after", lease)}
    assert registry.list().revision == old.revision + 1


def test_a_move_whose_source_has_changed_or_whose_target_is_there_does_nothing(
    registry: EtcdRegistry,
) -> None:
    old = registry.create("subnets/a", "before", 0)
    there = registry.create("subnets/b", "another's", 0)
    for source, revision, target in (
        ("subnets/a", old.revision, "subnets/b"),
        ("subnets/a", there.revision, "subnets/c"),
        ("subnets/z", 0, "subnets/b"),
    ):
        assert not registry.move(source, revision, target, "after", 0).ok
    assert keys(registry) == {"subnets/a": (b"before", 0), "subnets/b": (b"another's", 0)}
    gone = registry.grant(60)
    registry.revoke(gone)
    with pytest.raises(LeaseGone):
        registry.move("subnets/a", old.revision, "subnets/c", "after", gone)


def test_a_move_whose_answer_is_lost_counts_once(registry: EtcdRegistry) -> None:
    lease = registry.grant(60)
    old = registry.create("subnets/a", "before", lease)
    for _ in range(2):
        assert registry.move("subnets/a", old.revision, "subnets/b", "after", lease).ok
    assert keys(registry) == {"subnets/b": (b"after", lease)}


def test_detaching_keeps_the_value_and_only_what_was_read(registry: EtcdRegistry) -> None:
    lease = registry.grant(60)
    old = registry.create("subnets/a", "mine", lease)
    assert not registry.detach("subnets/a", old.revision - 1).ok
    assert keys(registry) == {"subnets/a": (b"mine", lease)}
    assert registry.detach("subnets/a", old.revision).ok
    assert keys(registry) == {"subnets/a": (b"mine", 0)}
    registry.revoke(lease)
    assert keys(registry) == {"subnets/a": (b"mine", 0)}


def test_creating_only_if_nothing_beside_it_is_newer(registry: EtcdRegistry) -> None:
    registry.create("subnets/a", "there", 0)
    seen = registry.list().revision
    registry.put("config", "newer, but elsewhere")
    assert registry.create("subnets/b", "first", 0, unchanged_since=seen).ok
    assert not registry.create("subnets/c", "second", 0, unchanged_since=seen).ok
    assert "subnets/c" not in keys(registry)
    assert registry.create("subnets/c", "second", 0, unchanged_since=registry.list().revision).ok
