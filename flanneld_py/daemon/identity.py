"""Who this host is: an id that survives address changes, and is given up to another host that has it too."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flanneld_py.core.nodeid import check_node_id, derive_node_id, is_node_id
from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.drivers.files import read_text, write_atomically
from flanneld_py.errors import HostError

MACHINE_ID = Path("/etc/machine-id")
SHOWN = 40
"""Characters of a garbage file."""


class Identity:
    """The node id, and what VTEP MACs are made from when the one made from it is taken.

    One thread renews it; any may read it. Whoever keeps a copy is told of a change by `changed`.
    """

    def __init__(
        self, node_id: str, *, fixed: bool = False, path: Path | None = None, mac_seed: str = ""
    ) -> None:
        """`fixed`: the operator gave it. `path`: where another one is kept."""
        self.node_id = node_id
        self.fixed = fixed
        self.mac_seed = mac_seed or secrets.token_hex(8)
        self.changed: Callable[[], None] = lambda: None
        self._path = path

    def renew(self) -> str:
        """Take a random node id, kept for the next start before it is used; the answer is the new one.

        Raises:
            HostError: it cannot be kept.
        """
        fresh = secrets.token_hex(16)
        if self._path is not None:
            _keep(fresh, self._path)
        self.mac_seed = secrets.token_hex(8)
        self.node_id = fresh
        self.changed()
        return fresh


def identity_of(given: str, state_dir: Path, mac_seed: str = "") -> Identity:
    """`--node-id`, else the one in the state directory, else one made from /etc/machine-id.

    A host without machine-id gets a random one, kept in the state directory.

    Raises:
        UsageError: the given id is malformed.
        HostError: the stored one is, or a random one cannot be kept.
    """
    path = state_dir / "node-id"
    if given:
        return Identity(check_node_id(given), fixed=True, mac_seed=mac_seed)
    stored = _stored(path) or _of_machine()
    if not stored:
        stored = secrets.token_hex(16)
        _keep(stored, path)
    return Identity(stored, path=path, mac_seed=mac_seed)


def _of_machine() -> str:
    with suppress(HostError, OSError):  # missing or "uninitialized": shared by many hosts
        return derive_node_id((read_text(MACHINE_ID) or "").strip())
    return ""


def _keep(node_id: str, path: Path) -> None:
    try:
        write_atomically(path, node_id + "\n")
    except OSError as error:
        raise HostError(
            f"--state-dir {path.parent}: the node id cannot be kept: {error.strerror}; make it writable, or "
            "give this host a name with --node-id"
        ) from error


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
