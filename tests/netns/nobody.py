"""Commands of ours run by a user without any right, who is to be refused."""

from __future__ import annotations

import sys

USER = 65534
SCRIPT = f"""
import importlib, os, pkgutil, sys
import flanneld_py
for module in pkgutil.walk_packages(flanneld_py.__path__, "flanneld_py."):
    importlib.import_module(module.name)
os.setgroups([])
os.setresgid({USER}, {USER}, {USER})
os.setresuid({USER}, {USER}, {USER})
del sys.argv[0]
sys.exit(importlib.import_module(sys.argv[0]).main())
"""
"""Gives up its rights when all modules are loaded: a checkout may lie where only root may enter."""


def as_nobody(module: str, *args: str) -> list[str]:
    """The command that runs a module's `main` as nobody."""
    return [sys.executable, "-c", SCRIPT, module, *args]
