"""The etcd prefix as a path."""

from __future__ import annotations

import posixpath

from flanneld_py.errors import UsageError


def normal_prefix(prefix: str) -> str:
    """The one spelling of a prefix that names the same keys: Unix path join, as Go's `path.Join` does it.

    Doubled and trailing slashes go, `.` and `..` are resolved; a leading slash is neither added nor removed.
    `/` stays as it is. Normal prefixes come back unchanged.

    Raises:
        UsageError: nothing is left, so the prefix would name every key there is; or it is not UTF-8.
    """
    try:
        prefix.encode()
    except UnicodeEncodeError:  # bytes of the command line that are none come as surrogates (PEP 383)
        raise UsageError(f"--etcd-prefix: {prefix!r}: expected UTF-8 text") from None
    normal = posixpath.normpath(prefix) if prefix else "."
    if normal == ".":
        raise UsageError(f"--etcd-prefix: {prefix!r}: expected a path such as /coreos.com/network")
    # POSIX lets two leading slashes mean something else, so normpath keeps them; etcd keys are just bytes.
    return "/" + normal.lstrip("/") if normal.startswith("/") else normal


def key_root(prefix: str) -> str:
    """What every key below a prefix starts with: `/coreos.com/network/`."""
    return normal_prefix(prefix).rstrip("/") + "/"
