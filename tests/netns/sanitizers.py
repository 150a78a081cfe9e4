"""The extension `_pump` built with a sanitizer, in a package of its own that worker.py finds it in."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.udp import pump

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "sanitized_worker.py"
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",  # the interpreter leaks at its end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def _run(argv: Sequence[str | Path]) -> str:
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@dataclass(frozen=True, slots=True)
class Sanitized:
    """A built one. What a sanitizer finds ends the worker and is written to `reports`."""

    library: Path
    worker: Path
    reports: Path

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """From now on `pump.Pump` starts workers of this kind."""
        patch.setattr(pump, "WORKER", STAND_IN)
        patch.setattr(pump, "ANSWER_WITHIN", 10 * pump.ANSWER_WITHIN)  # it may be that much slower
        patch.setenv("SANITIZER_LIBRARY", str(self.library))
        patch.setenv("SANITIZED_WORKER", str(self.worker))
        for name, value in OPTIONS.items():
            patch.setenv(name, f"{value}:log_path={self.reports / name}")

    def found(self) -> str:
        """What was reported since the last time."""
        texts = []
        for report in sorted(self.reports.iterdir()):
            texts.append(report.read_text(errors="replace"))
            report.unlink()
        return "\n".join(texts)


def build(kind: str, place: Path) -> Sanitized:
    """Compiles what pyproject.toml lists, with a sanitizer of FLAGS, into `place`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    compiler = shlex.split(os.environ.get("CC", "cc"))
    library = Path(_run([*compiler, f"-print-file-name={LIBRARIES[kind]}"]))
    if not library.is_absolute():
        pytest.skip(f"{compiler[0]} has no {LIBRARIES[kind]} that could be loaded first; CC=gcc has")
    package, reports = place / "flanneld_py" / "udp", place / "reports"
    package.mkdir(parents=True)
    reports.mkdir()
    for source in (ROOT / "flanneld_py" / "__init__.py", *(ROOT / "flanneld_py" / "udp").glob("*.py")):
        (place / source.relative_to(ROOT)).symlink_to(source)
    macros = [f"-D{name}={value}" for name, value in extension["define-macros"]]
    flags = ["-std=c11", "-g", "-O1", "-fno-omit-frame-pointer", "-fPIC", "-shared", "-pthread"]
    include = f"-I{sysconfig.get_path('include')}"
    sources = [ROOT / source for source in extension["sources"]]
    target = package / "_pump.abi3.so"
    _run([*compiler, *flags, *FLAGS[kind], *macros, include, "-o", target, *sources])
    return Sanitized(library, package / "worker.py", reports)
