"""Who this host is, to the registry and on the wire."""

from __future__ import annotations

import hashlib
import hmac
import re

from flanneld_py.errors import HostError, UsageError

_MACHINE_ID = re.compile(r"[0-9a-f]{32}")
_NODE_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def is_node_id(text: str) -> bool:
    """Whether a record may bear it: 1 to 64 letters, digits, `_`, `.` and `-`."""
    return _NODE_ID.fullmatch(text) is not None


def check_node_id(text: str) -> str:
    """The node id a user gave.

    Raises:
        UsageError: it may not stand in a record.
    """
    if not is_node_id(text):
        raise UsageError(f"--node-id {text!r}: expected 1 to 64 of letters, digits, '_', '.' and '-'")
    return text


def derive_node_id(machine_id: str) -> str:
    """32 hex digits from the text of /etc/machine-id, which itself must not be published (machine-id(5)).

    Raises:
        HostError: no machine id (an image's placeholder): hosts sharing it would take each other's leases.
    """
    text = machine_id.strip()
    if not _MACHINE_ID.fullmatch(text):
        raise HostError(
            f"/etc/machine-id holds {text[:40]!r}: expected 32 hex digits; run systemd-machine-id-setup, "
            "or give this host a name with --node-id"
        )
    return hmac.new(text.encode(), b"flanneld-py", hashlib.sha256).hexdigest()[:32]


def vtep_mac(node_id: str, prefix: str, device: str, salt: int = 0) -> str:
    """A stable MAC for a device of ours: locally administered and unicast (IEEE 802, U/L and I/G bits)."""
    digest = hashlib.sha256("\0".join((node_id, prefix, device, str(salt))).encode()).digest()
    return bytes((digest[0] & 0xFC | 0x02, *digest[1:6])).hex(":")
