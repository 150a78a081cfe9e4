"""The tools by which packet-filter rules are written: nft, and iptables in its two variants."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from flanneld_py.core.rules import Tool

Where: TypeAlias = Literal["nft", "legacy"]
TIMEOUT = 10.0
"""Seconds for one run; iptables itself waits up to `LOCK_WAIT` for its lock."""
LOCK_WAIT = 5
RANDOM_FULLY = (1, 6, 2)
"""The first iptables that has MASQUERADE --random-fully."""
MOST_TOLD = 300
"""Characters of what a tool said that go into a message."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What is installed here."""

    nft: str = ""
    """Its path; empty: none."""
    restore: Mapping[tuple[Where, str], str] = field(default_factory=dict)
    """(variant, family `ip` or `ip6`) → path of its iptables-restore."""
    default: Where | None = None
    """The variant of plain `iptables`."""
    random_fully: bool = True

    def choose(self, *, nftables: bool) -> Tool | None:
        """Which one writes our rules: that of the config, or the only one there is; None: there is none."""
        if self.nft and (nftables or self.default is None):
            return "nft"
        if self.default is None:
            return None
        return "iptables-nft" if self.default == "nft" else "iptables-legacy"


def find_tools() -> Tools:
    """Look for them in $PATH, and in the folders of the administrator's commands."""
    restore: dict[tuple[Where, str], str] = {}
    variants: tuple[Where, ...] = ("nft", "legacy")
    for variant in variants:
        for family, name in (("ip", "iptables"), ("ip6", "ip6tables")):
            if path := _find(f"{name}-{variant}-restore"):
                restore[variant, family] = path
    default, version = _plain_iptables()
    if default is not None:
        for family, name in (("ip", "iptables"), ("ip6", "ip6tables")):
            if path := _find(f"{name}-restore"):
                restore.setdefault((default, family), path)
    return Tools(_find("nft"), restore, default, default is None or version >= RANDOM_FULLY)


def _find(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin") or ""


def _plain_iptables() -> tuple[Where | None, tuple[int, ...]]:
    """Variant and version of `iptables-restore`: only it can tell which of the two it is."""
    path = _find("iptables-restore")
    if not path:
        return None, ()
    try:
        done = subprocess.run(
            [path, "--version"], check=False, capture_output=True, text=True, timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, ()
    found = re.search(r"v(\d+(?:\.\d+)*)", done.stdout)
    version = tuple(int(part) for part in found[1].split(".")) if found else ()
    return ("nft" if "nf_tables" in done.stdout else "legacy"), version


def run_script(argv: list[str], script: str) -> str | None:
    """Hand a script to a tool; None: it was carried out, else what was said against it."""
    try:
        done = subprocess.run(
            argv, input=script, check=False, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"{argv[0]} had not ended after {TIMEOUT:g} s"
    except OSError as error:
        return f"cannot run {argv[0]}: {error.strerror}"
    if done.returncode == 0:
        return None
    said = " ".join((done.stderr or done.stdout).split())[:MOST_TOLD]
    return f"{argv[0]}: {said or f'exited with {done.returncode}'}"
