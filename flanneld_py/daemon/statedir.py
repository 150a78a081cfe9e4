"""Files of the state directory: what cannot be used is put aside with a warning, and stops nobody."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import structlog

from flanneld_py.daemon.oldfiles import ASIDE, read_regular


def read_own(path: Path, longest: int = 0) -> str | None:
    """The text of a file of the state directory; None when there is none that can be read.

    One that another user made is put aside: whoever can write there could tell us what he likes.
    """
    log = structlog.get_logger().bind(part="main")
    try:
        owner = path.lstat().st_uid
        if owner not in (0, os.geteuid()):
            put_aside(path, f"belongs to user {owner}")
            return None
        return read_regular(path, longest)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("file_ignored", path=str(path), error=error.strerror)
        return None


def put_aside(path: Path, reason: str) -> None:
    """Log why a file of the state directory is not used, and let another one take its place."""
    aside = path.with_name(path.name + ASIDE)
    kept = False
    with suppress(OSError):
        path.replace(aside)
        kept = True
    structlog.get_logger().warning(
        "file_put_aside",
        part="main",
        path=str(path),
        reason=f"it {reason}",
        kept_as=str(aside) if kept else None,
        fix="none is needed while etcd answers, which has it all; if a flag was to blame, correct that and "
        "rename it back; else delete it",
    )
