"""Who this host is: an id that survives address changes."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from flanneld_py.core.nodeid import check_node_id, derive_node_id
from flanneld_py.drivers.files import read_text, write_atomically
from flanneld_py.errors import HostError

MACHINE_ID = Path("/etc/machine-id")


def node_id_of(given: str, state_dir: Path) -> str:
    """`--node-id`, else the one in the state directory, else one made from /etc/machine-id.

    A host without machine-id gets a random one, kept in the state directory.

    Raises:
        UsageError: the given or stored id is malformed.
        HostError: a random one cannot be kept.
    """
    if given:
        return check_node_id(given)
    stored = (read_text(state_dir / "node-id") or "").strip()
    if stored:
        return check_node_id(stored)
    with suppress(HostError):  # missing or "uninitialized": shared by many hosts
        return derive_node_id((read_text(MACHINE_ID) or "").strip())
    fresh = secrets.token_hex(16)
    try:
        write_atomically(state_dir / "node-id", fresh + "\n")
    except OSError as error:
        raise HostError(f"--state-dir {state_dir}: the node id cannot be kept: {error.strerror}") from error
    return fresh
