"""flanneld-py that hears nothing of the kernel: only its read-back timer and etcd make it look again.

With it a test of repairs shows that it fails without what it is about.
"""

from __future__ import annotations

from flanneld_py.cli.daemon import main
from flanneld_py.daemon.hostwatch import HostWatch


def _hear_nothing(_watch: HostWatch) -> None:
    """In the place of HostWatch.run."""


if __name__ == "__main__":
    HostWatch.run = _hear_nothing  # type: ignore[assignment, method-assign]
    main()
