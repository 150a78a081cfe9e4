"""Who this host is: an id that survives address changes."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from flanneld_py.core.nodeid import check_node_id, derive_node_id, is_node_id
from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.drivers.files import read_text, write_atomically
from flanneld_py.errors import HostError

MACHINE_ID = Path("/etc/machine-id")
SHOWN = 40
"""Characters of a garbage file."""


def node_id_of(given: str, state_dir: Path) -> str:
    """`--node-id`, else the one in the state directory, else one made from /etc/machine-id.

    A host without machine-id gets a random one, kept in the state directory.

    Raises:
        UsageError: the given id is malformed.
        HostError: the stored one is, or a random one cannot be kept.
    """
    if given:
        return check_node_id(given)
    path = state_dir / "node-id"
    stored = _stored(path)
    if stored:
        return stored
    with suppress(HostError, OSError):  # missing or "uninitialized": shared by many hosts
        return derive_node_id((read_text(MACHINE_ID) or "").strip())
    fresh = secrets.token_hex(16)
    try:
        write_atomically(path, fresh + "\n")
    except OSError as error:
        raise HostError(f"--state-dir {state_dir}: the node id cannot be kept: {error.strerror}") from error
    return fresh


def _stored(path: Path) -> str:
    """Unlike other old files it is not ignored when damaged: with another id the host loses its subnet."""
    advice = "restore it, or delete it and set --node-id"
    try:
        text = (read_regular(path) or "").strip()
    except OSError as error:
        raise HostError(f"{path}: cannot read the node id: {error.strerror}; {advice}") from error
    if text and not is_node_id(text):
        raise HostError(
            f"{path} holds {text[:SHOWN]!r}{' …' if len(text) > SHOWN else ''}: expected 1 to 64 of letters, "
            f"digits, '_', '.' and '-'; {advice}"
        )
    return text
