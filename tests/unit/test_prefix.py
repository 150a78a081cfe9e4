"""Prefixes name the same keys as flannel's."""

from __future__ import annotations

import pytest

from flanneld_py.core.prefix import key_root, normal_prefix
from flanneld_py.errors import UsageError


@pytest.mark.parametrize(
    ("given", "normal", "root"),
    [
        ("/coreos.com/network", "/coreos.com/network", "/coreos.com/network/"),
        ("/coreos.com/network/", "/coreos.com/network", "/coreos.com/network/"),
        ("//coreos.com///network//", "/coreos.com/network", "/coreos.com/network/"),
        ("foo", "foo", "foo/"),
        ("foo/", "foo", "foo/"),
        ("./foo/./bar", "foo/bar", "foo/bar/"),
        ("/foo/../bar", "/bar", "/bar/"),
        ("/", "/", "/"),
        ("//", "/", "/"),
    ],
)
def test_prefix_is_joined_as_a_path(given: str, normal: str, root: str) -> None:
    assert normal_prefix(given) == normal
    assert normal_prefix(normal) == normal
    assert key_root(given) == root


@pytest.mark.parametrize("given", ["", ".", "foo/.."])
def test_prefix_that_names_every_key_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--etcd-prefix"):
        normal_prefix(given)
