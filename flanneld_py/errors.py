"""One error hierarchy, by whose fault it is; foreign exceptions become these at the drivers' rim."""

from __future__ import annotations

from typing import ClassVar


class FlanneldError(Exception):
    """Any failure we can explain. `str()` is one line for a person: what, the value, what to do."""

    exit_code: ClassVar[int] = 70
    """Of a daemon that it ends: sysexits.h, or 2 as for every wrong command line."""


class UsageError(FlanneldError):
    """The command line or environment is wrong. Exit 2."""

    exit_code = 2


class HostError(FlanneldError):
    """This host lacks something and a restart does not cure it. Exit 78."""

    exit_code = 78


class HostNotReady(HostError):
    """This host lacks something that it may get any moment, such as an address by DHCP. Wait for it."""


class Unsupported(HostError):
    """This kernel cannot do what the network config asks for."""


class ConfigError(FlanneldError):
    """The network config in the registry is invalid; the old one stays in force."""


class RecordError(FlanneldError):
    """One registry record cannot be used. It costs that record only."""


class RegistryError(FlanneldError):
    """etcd could not answer. Nothing may be concluded about what is stored there."""

    exit_code = 78


class Unreachable(RegistryError):
    """No endpoint answered in time; the same call may succeed later."""


class Refused(RegistryError):
    """etcd answered, and will answer so again until an operator acts (TLS, password, permission)."""


class Compacted(RegistryError):
    """The revision to resume from is gone: list again."""


class Replaced(Compacted):
    """etcd was wiped, or restored from a backup: it has another history than the one known."""


class LeaseGone(RegistryError):
    """The etcd lease a key was to be attached to has ended: grant a new one. Nothing was written."""


class LeaseLost(FlanneldError):
    """Our subnet is another host's, and the operator wants the process to end then. Exit 75: EX_TEMPFAIL."""

    exit_code = 75


class KernelError(FlanneldError):
    """The kernel refused a request as a whole (not one row, which is an `Outcome`)."""
