"""Modules that a start imports and does not use: read when something of them is asked for.

A daemon that starts would read sixty modules for them, a tenth of its start and three megabytes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from threading import RLock
from types import ModuleType
from typing import Any

UNUSED = (
    "asyncio",  # structlog.stdlib and grpc.aio
    "google.protobuf.internal.python_message",  # only protobuf without its C library uses it
    "grpc.aio",  # grpc
    "ssl",  # drivers.etcdsettings, for https
    "tenacity",  # etcd3.locks
)
_reading = RLock()


class _Later(ModuleType):
    """Stands for a module until an attribute is asked for.

    importlib's LazyLoader would read it at the next import already (until Python 3.12).
    """

    def __getattr__(self, name: str) -> Any:
        # What the interpreter looks for in every module that it comes across is not asked for.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        with _reading:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
            return getattr(import_module(self.__name__), name)


def put_off() -> None:
    """To be called before anything imports these."""
    for name in UNUSED:
        sys.modules.setdefault(name, _Later(name))
