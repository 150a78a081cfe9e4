"""Who imports whom, who starts threads, and where the outside world is touched (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "flanneld_py"
ROOT = Path(__file__).parents[2] / PACKAGE
MOST_LINES = 450
MOST_FUNCTION_LINES = 60

VALUES = {"", "addresses", "model", "errors", "datapath", "packetfilter", "values"}
"""`` is flanneld_py itself, which holds the version."""
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "addresses": set(),
    "values": set(),
    "packetfilter": {"addresses", "values"},
    "datapath": {"addresses"},
    "model": {"addresses", "datapath", "packetfilter", "values"},
    "core": VALUES | {"core"},
    "backends": VALUES | {"core", "backends"},
    "drivers": VALUES | {"core"},
    "udp": VALUES | {"core", "udp"},
    "daemon": VALUES | {"core", "backends", "drivers", "udp", "daemon"},
    "cli": VALUES | {"core", "backends", "drivers", "udp", "daemon", "cli"},
    "lab": {"lab"},
}
DRIVER_PARTS = (
    {"etcd", "etcdanswers", "etcdlink", "etcdrpc", "etcdsettings", "etcdtxn", "etcdwatch"},
    {
        "blackholes",
        "hostroutes",
        "kernel",
        "links",
        "linkmessages",
        "linkvalues",
        "monitor",
        "netlink",
        "neighbours",
        "nexthopids",
        "oddrows",
        "ownwrites",
        "refusals",
        "rtmessages",
        "rtnetlink",
        "subscription",
        "tunmaker",
    },
    {
        "nfdecode",
        "nfdelete",
        "nfmessages",
        "nfmonitor",
        "nfreader",
        "nfruleset",
        "nfvalues",
        "subscription",
        "netlink",
        "xtables",
        "xtdecode",
        "xtextensions",
        "packetrules",
        "rulewriter",
        "filtertools",
    },
)
"""Modules of drivers/ that are for the same outside thing and may import one another; base is for all."""
ONLY_IN: dict[str, tuple[str, ...]] = {
    "etcd3": ("drivers.etcdlink", "drivers.etcdrpc"),
    "grpc": ("drivers.etcd", "drivers.etcdrpc", "drivers.etcdwatch", "lab.crowd_end"),
    "google": ("drivers.etcdrpc",),
    "prometheus_client": ("daemon.metrics",),
    "pyroute2": (),
    "scapy": ("lab",),
    "_thread": (),
    "asyncio": (),
    "concurrent": ("daemon", "lab"),
    "multiprocessing": ("lab",),
}
"""Foreign package → the modules, or packages of modules, that may import it."""
THREAD_STARTERS = ("daemon", "lab", "udp.pump")
PURE = ("core", "backends")
IMPURE_MODULES = {
    "os",
    "socket",
    "time",
    "subprocess",
    "threading",
    "signal",
    "shutil",
    "tempfile",
    "select",
    "fcntl",
}
IMPURE_BUILTINS = {"open", "input", "print"}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: `module` as far as it is certainly a module, `name` within it if any."""

    line: int
    module: str
    name: str = ""

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def imports(tree: ast.AST, package: str) -> Iterator[Import]:
    """All imports, also those within functions; `package` (dotted) resolves the relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, module, alias.name)


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def ours(found: Import) -> str | None:
    """Which part of the package is imported, dotted (`drivers.base`), or None for foreign modules."""
    if found.module != PACKAGE and not found.module.startswith(f"{PACKAGE}."):
        return None
    inside = found.module.removeprefix(PACKAGE).removeprefix(".")
    if inside in MAY_IMPORT and (inside or found.name in MAY_IMPORT):
        inside = f"{inside}.{found.name}".strip(".")
    return inside


def import_faults(module: str, found: Import) -> Iterator[str]:
    part, _, rest = module.partition(".")
    target = ours(found)
    if target is None:
        foreign = found.module.partition(".")[0]
        if foreign in ONLY_IN and not within(module, ONLY_IN[foreign]):
            yield f"{found.line}: imports {foreign}, left to {' and '.join(ONLY_IN[foreign]) or 'nobody'}"
        if part in PURE and foreign in IMPURE_MODULES:
            yield f"{found.line}: {part} is pure, but imports {foreign}"
        if part in PURE and found.module == "random" and found.name not in ("", "Random"):
            yield f"{found.line}: {part} is pure, but imports the global random.{found.name}"
        if found.full in ("threading.Thread", "threading.Timer") and not within(module, THREAD_STARTERS):
            yield f"{found.line}: imports {found.full}, but starts no threads"
        return
    aim, _, below = target.partition(".")
    if part == "drivers" and aim == "drivers":
        driver = below.partition(".")[0]
        if driver != "base" and not any({rest, driver} <= parts for parts in DRIVER_PARTS):
            yield f"{found.line}: driver {rest} imports driver {driver}"
    elif aim not in MAY_IMPORT[part]:
        yield f"{found.line}: {part or PACKAGE} may not import {aim or PACKAGE}"


def use_faults(module: str, tree: ast.AST) -> Iterator[str]:
    """Threads started and impure functions called where they may not be."""
    pure = within(module, PURE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = f"{node.value.id}.{node.attr}"
            if used in ("threading.Thread", "threading.Timer") and not within(module, THREAD_STARTERS):
                yield f"{node.lineno}: uses {used}, but starts no threads"
            if pure and node.value.id == "random" and node.attr != "Random":
                yield f"{node.lineno}: pure code uses the global {used}"
        if (
            pure
            and isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in IMPURE_BUILTINS
        ):
            yield f"{node.lineno}: pure code calls {node.func.id}()"


def length_faults(source: str, tree: ast.AST) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MOST_LINES:
        yield f"1: {lines} lines; ask whether two things live in one room above {MOST_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines, more than {MOST_FUNCTION_LINES}"


def dotted(path: str) -> tuple[str, str]:
    """Of a path in the package: its module without the package's name, and where relative imports start."""
    parts = path.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts = parts[:-1]
        return ".".join(parts), ".".join([PACKAGE, *parts])
    return ".".join(parts), ".".join([PACKAGE, *parts[:-1]])


def faults(path: str, source: str) -> list[str]:
    """What is wrong with one file, as `path:line: reason`."""
    module, package = dotted(path)
    if module.partition(".")[0] not in MAY_IMPORT:
        return [f"{path}:1: {module} has no place in the import table"]
    tree = ast.parse(source)
    found = [fault for item in imports(tree, package) for fault in import_faults(module, item)]
    found += [*use_faults(module, tree), *length_faults(source, tree)]
    return [f"{path}:{fault}" for fault in dict.fromkeys(found)]


class _WithoutTypeChecking(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def _at_run_time(tree: ast.AST) -> ast.AST:
    return _WithoutTypeChecking().visit(tree)  # type: ignore[no-any-return]


def cycles(sources: Mapping[str, str]) -> list[str]:
    """Import cycles among files (path → source), each once, as `a -> b -> a`; imports for mypy close none."""
    modules = {".".join([PACKAGE, dotted(path)[0]]).strip("."): path for path in sources}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = {
            name
            for item in imports(_at_run_time(ast.parse(sources[path])), dotted(path)[1])
            for name in (item.full, item.module)
            if name in modules
        }
        # `from package import module` is for the module; that the package's __init__ runs is Python's doing.
        graph[module] = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    rings: dict[frozenset[str], str] = {}
    for start in graph:
        _walk(graph, [start], rings, set())
    return sorted(rings.values())


def _walk(
    graph: Mapping[str, set[str]], way: list[str], rings: dict[frozenset[str], str], seen: set[str]
) -> None:
    for following in sorted(graph[way[-1]]):
        if following == way[0]:
            rings.setdefault(frozenset(way), " -> ".join([*way, following]))
        elif following not in seen:
            seen.add(following)
            _walk(graph, [*way, following], rings, seen)


SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def test_the_sources_are_found() -> None:
    assert {"model.py", "errors.py", "core/config.py", "core/records.py", "drivers/base.py"} <= SOURCES.keys()


@pytest.mark.parametrize("path", SOURCES)
def test_the_rules_are_kept(path: str) -> None:
    assert faults(path, SOURCES[path]) == []


def test_there_are_no_import_cycles() -> None:
    assert cycles(SOURCES) == []


# --- the rules can be broken ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("model.py", "from flanneld_py.errors import FlanneldError", "model may not import errors"),
        ("errors.py", "import flanneld_py.core.config", "errors may not import core"),
        ("core/x.py", "from flanneld_py.backends import vxlan", "core may not import backends"),
        ("core/x.py", "from flanneld_py import drivers", "core may not import drivers"),
        ("core/x.py", "from ..drivers import base", "core may not import drivers"),
        ("core/x.py", "from .. import daemon", "core may not import daemon"),
        ("core/x.py", "def f():\n    import flanneld_py.cli.daemon", "core may not import cli"),
        ("backends/x.py", "from flanneld_py.drivers.base import Driver", "backends may not import drivers"),
        ("drivers/x.py", "from flanneld_py.backends import BACKENDS", "drivers may not import backends"),
        ("drivers/x.py", "from flanneld_py.drivers import kernel", "driver x imports driver kernel"),
        ("drivers/etcd.py", "from flanneld_py.drivers import netlink", "driver etcd imports driver netlink"),
        (
            "drivers/x.py",
            "from flanneld_py.drivers.kernel import KernelLinks",
            "driver x imports driver kernel",
        ),
        ("drivers/x.py", "from . import kernel", "driver x imports driver kernel"),
        ("drivers/x.py", "from .kernel import KernelLinks", "driver x imports driver kernel"),
        ("drivers/x.py", "from flanneld_py.udp import pump", "drivers may not import udp"),
        ("udp/pump.py", "from flanneld_py.drivers import base", "udp may not import drivers"),
        ("daemon/x.py", "from flanneld_py.cli.ctl import main", "daemon may not import cli"),
        ("lab/x.py", "from flanneld_py.model import Host", "lab may not import model"),
        ("lab/x.py", "from flanneld_py import __version__", "lab may not import flanneld_py"),
        ("cli/x.py", "import flanneld_py.lab", "cli may not import lab"),
        ("utils.py", "", "no place in the import table"),
        ("daemon/x.py", "import etcd3", "imports etcd3"),
        ("drivers/kernel.py", "from grpc import insecure_channel", "imports grpc"),
        ("drivers/rtnetlink.py", "from pyroute2.netlink import nlmsg", "imports pyroute2"),
        ("drivers/kernel.py", "from google.protobuf import message", "imports google"),
        ("cli/x.py", "def f():\n    from scapy.all import IP", "imports scapy"),
        ("daemon/x.py", "import asyncio", "imports asyncio, left to nobody"),
        ("core/x.py", "import os", "core is pure, but imports os"),
        ("core/x.py", "import os.path", "core is pure, but imports os"),
        ("backends/x.py", "from time import monotonic", "backends is pure, but imports time"),
        ("backends/x.py", "import socket as s", "backends is pure, but imports socket"),
        ("core/x.py", "from random import choice", "imports the global random.choice"),
        ("core/x.py", "import random\nrandom.choice([1])", "uses the global random.choice"),
        ("core/x.py", "open('/etc/machine-id')", "calls open()"),
        (
            "drivers/x.py",
            "import threading\nthreading.Thread()",
            "uses threading.Thread, but starts no threads",
        ),
        ("drivers/x.py", "from threading import Timer", "imports threading.Timer, but starts no threads"),
        ("cli/x.py", "import threading\nclass A(threading.Thread): ...", "uses threading.Thread"),
        ("drivers/x.py", "from concurrent.futures import ThreadPoolExecutor", "imports concurrent"),
        ("core/x.py", "x = 1\n" * (MOST_LINES + 1), "lines; ask whether"),
        ("core/x.py", "def f():\n" + "    x = 1\n" * MOST_FUNCTION_LINES, "f has 61 lines"),
    ],
)
def test_a_broken_rule_is_caught(path: str, source: str, reason: str) -> None:
    found = faults(path, source)
    assert len(found) == 1, found
    assert reason in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "core/x.py",
            "from flanneld_py import __version__\nfrom flanneld_py.core import config\nfrom . import records",
        ),
        (
            "core/x.py",
            "from random import Random\nimport random\ndef f(rng: random.Random): return rng.choice([1])",
        ),
        (
            "backends/__init__.py",
            "from .vxlan import Vxlan\nfrom flanneld_py.core.config import parse_config",
        ),
        (
            "drivers/etcdlink.py",
            "import etcd3\nfrom flanneld_py.drivers import etcdrpc\nfrom .base import Driver",
        ),
        ("drivers/x.py", "import os, threading\nfrom flanneld_py.core import rules\nthreading.Lock()"),
        (
            "daemon/x.py",
            "import threading\nthreading.Thread()\nfrom flanneld_py.drivers.etcd import EtcdRegistry",
        ),
        ("udp/pump.py", "import threading\nthreading.Thread()"),
        ("cli/ctl/x.py", "from flanneld_py.daemon import run\nfrom ..x import y"),
        (
            "lab/x.py",
            "from . import etcd\nfrom .hosts import Host\nimport scapy, threading\nthreading.Thread()",
        ),
        ("core/x.py", "x = 1\n" * MOST_LINES),
    ],
)
def test_what_is_allowed_is_let_pass(path: str, source: str) -> None:
    assert faults(path, source) == []


def test_a_cycle_is_caught() -> None:
    sources = {
        "core/__init__.py": "",
        "core/a.py": "from flanneld_py.core import b",
        "core/b.py": "def f():\n    from .c import x",
        "core/c.py": "import flanneld_py.core.a",
        "core/d.py": "from flanneld_py.core.a import y\nfrom . import c",
    }
    ring = "flanneld_py.core.a -> flanneld_py.core.b -> flanneld_py.core.c -> flanneld_py.core.a"
    assert cycles(sources) == [ring]
    assert cycles({**sources, "core/c.py": ""}) == []
    assert cycles({**sources, "core/c.py": "if typing.TYPE_CHECKING:\n    from . import a"}) == []
    assert cycles({**sources, "core/c.py": "if True:\n    from . import a"}) == [ring]


def test_a_cycle_through_a_package_is_caught() -> None:
    sources = {"core/__init__.py": "from .a import x", "core/a.py": "from flanneld_py.core import y"}
    assert cycles(sources) == ["flanneld_py.core -> flanneld_py.core.a -> flanneld_py.core"]
