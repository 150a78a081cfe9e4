"""What etcd and gRPC answer, as values and errors of ours. Part of the etcd driver."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from flanneld_py.errors import Compacted, LeaseGone, Refused, RegistryError, Replaced, Unreachable
from flanneld_py.model import Entry


class LeaseTime(NamedTuple):
    """How an etcd lease stands."""

    left: int
    """Seconds; -1 when it has ended."""
    granted: int
    """Seconds that it has just after a renewal; 0 when it has ended."""
    keys: int = 0
    """How many hang on it, if that was asked for."""


def range_end(root: bytes) -> bytes:
    """The first key after all that start with `root`, which ends in a slash."""
    return root[:-1] + b"0"


def relative_key(key: bytes, root: bytes) -> str:
    return key[len(root) :].decode("utf-8", "backslashreplace")


def entry_of(kv: Any, root: bytes) -> Entry:
    """A mvccpb.KeyValue as an entry."""
    return Entry(relative_key(kv.key, root), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


CA, CERTIFICATE, USER = "--etcd-cafile", "--etcd-certfile, --etcd-keyfile", "--etcd-username, --etcd-password"
"""The flags that a refusal concerns."""
TRY_TLS = "; if it never worked, try https://"


class TokenRefused(Refused):
    """A new authentication token may cure it."""


class LeaseExists(RegistryError):
    """The lease id is taken."""


class TooLarge(RegistryError):
    """The answer exceeds what gRPC was told to receive."""


class AttemptError(Exception):
    """Why one attempt at one endpoint failed."""

    def __init__(self, kind: type[RegistryError], reason: str, *, elsewhere: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.elsewhere = elsewhere or issubclass(kind, Unreachable)
        """Another endpoint may answer, or this one on a new connection."""

    def at(self, endpoint: str) -> RegistryError:
        return self.kind(f"etcd {self.text(endpoint)}")

    def text(self, endpoint: str) -> str:
        """The reason as this endpoint has it."""
        reason = self.reason.removesuffix(TRY_TLS) if endpoint.startswith("https:") else self.reason
        return f"{endpoint}: {reason}"


# Status and details of a gRPC error → what it is, and a reason of a few words ({} is the matched group). The
# first that matches counts. etcd's texts: its api/v3rpc/rpctypes. gRPC's: those of grpcio 1.62 to 1.85.
_CAUSES: tuple[tuple[str, type[RegistryError], str], ...] = (
    ("^DEADLINE_EXCEEDED", Unreachable, "deadline exceeded: no answer in time"),
    ("^UNAUTHENTICATED (.*)", TokenRefused, "{}"),
    (
        "user name is empty",
        TokenRefused,
        f"wants a user and password ({USER})",
    ),
    ("(revision of auth store is old)", TokenRefused, "{}"),
    (
        "authentication failed",
        Refused,
        f"wrong user or password ({USER})",
    ),
    ("^PERMISSION_DENIED (.*)", Refused, "{}; see `etcdctl role get`"),
    ("^OUT_OF_RANGE (.*compacted.*)", Compacted, "{}"),
    ("^OUT_OF_RANGE .*future revision", Replaced, "the registry was replaced or restored: list again"),
    ("^NOT_FOUND (.*lease.*)", LeaseGone, "{}"),
    ("(lease already exists)", LeaseExists, "{}"),
    ("^RESOURCE_EXHAUSTED (.*larger than max.*)", TooLarge, "{}"),
    ("(database space exceeded)", Unreachable, "{}: compact, defragment, then `etcdctl alarm disarm`"),
    ("^(?:INVALID_ARGUMENT|FAILED_PRECONDITION) (.*)", RegistryError, "{}"),
    ("CERTIFICATE_VERIFY_FAILED: ([^:]+)", Refused, f"TLS verification failed: {{}} ({CA})"),
    ("CERTIFICATE_VERIFY_FAILED", Refused, f"TLS verification failed ({CA})"),
    ("Hostname Verification|[Pp]eer name", Refused, "TLS verification failed: certificate of another host"),
    (
        "Unwrap failed|Secure read failed|CERTIFICATE_REQUIRED|ALERT_UNKNOWN_CA|ALERT_BAD_CERTIFICATE",
        Refused,
        f"TLS: it refuses our client certificate, or the lack of one ({CERTIFICATE})",
    ),
    ("Handshake read failed|WRONG_VERSION_NUMBER", Unreachable, "no TLS; does it serve http:// only?"),
    ("errors resolving|DNS resolution failed", Unreachable, "the name does not resolve"),
    ("HTTP/2|http1|http2 header", Unreachable, "does not speak gRPC; is this etcd's client port?"),
    (
        "(Connection refused|Connection reset by peer|No route to host|Network is unreachable)",
        Unreachable,
        "{}",
    ),
    ("ping timeout|[Kk]eepalive", Unreachable, "no answer to pings"),
    ("[Tt]imed? ?out|FD [Ss]hutdown", Unreachable, "deadline exceeded: no connection in time"),
    (
        "Socket closed|Broken pipe|RST_STREAM",
        Unreachable,
        f"connection closed{TRY_TLS}",
    ),
    ("^[A-Z_]+ (?:.*last error: )?(?:[A-Z]+: )?(.{1,200})", Unreachable, "{}"),
)


def explain(error: Any, given: Mapping[str, str] = MappingProxyType({})) -> AttemptError:
    """A grpc.RpcError as a reason of a few words; `given`: CA, CERTIFICATE and USER as the user gave them."""
    status = error.code().name
    details = " ".join((error.details() or "").replace("etcdserver: ", "").split())
    for pattern, kind, reason in _CAUSES:
        if found := re.search(pattern, f"{status} {details}"):
            groups = (group[:1].lower() + group[1:] for group in found.groups())
            text = reason.format(*groups)
            for flags, words in given.items():
                text = text.replace(f"({flags})", f"({words})")
            return AttemptError(kind, text, elsewhere=status == "UNAVAILABLE")
    return AttemptError(Unreachable, status)


def joined(failures: dict[str, AttemptError]) -> RegistryError:
    """One error for all the endpoints tried; Refused only when every one refused."""
    kinds = {failure.kind for failure in failures.values()}
    kind = kinds.pop() if len(kinds) == 1 else Unreachable
    reasons = (failure.text(endpoint) for endpoint, failure in failures.items())
    return kind("etcd " + "; ".join(reasons))
