"""Runs one target under atheris, which is libFuzzer for Python: `python -m tests.fuzz NAME FOLDER ARGUMENT…`.

FOLDER is where it keeps what it finds interesting; the arguments are libFuzzer's, or inputs to be tried
again. `.ci/fuzz` calls this.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import FunctionType

from tests.fuzz.targets import NAMES, load

USAGE = "usage: python -m tests.fuzz NAME FOLDER [ARGUMENT…], where NAME is one of " + ", ".join(NAMES)

if len(sys.argv) < 3 or sys.argv[1] not in NAMES:
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)

import atheris  # noqa: E402 - it is not there for every Python


def main(name: str, folder: Path, *arguments: str) -> None:
    """Ends the process."""
    with atheris.instrument_imports(include=["flanneld_py"], enable_loader_override=False):
        target = load(name)
    for module in target.plugins:
        _instrument(module)
    corpus, seeds, words = folder / "corpus", folder / "seeds", folder / "words"
    for directory in (corpus, seeds):
        directory.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (seeds / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words), encoding="ascii")
    options = [f"-dict={words}", f"-artifact_prefix={folder}/", *arguments]
    if all(argument.startswith("-") for argument in arguments):
        options += [str(corpus), str(seeds)]
    atheris.Setup([name, *options], target.check)
    atheris.Fuzz()


def _instrument(module: object) -> None:
    """The functions of a module that was imported without."""
    for value in vars(module).values():
        members = vars(value).values() if isinstance(value, type) else (value,)
        for member in members:
            if isinstance(member, FunctionType) and member.__module__ == getattr(module, "__name__", ""):
                atheris.instrument_func(member)


def _escaped(word: str) -> str:
    return "".join(f"\\x{octet:02x}" for octet in word.encode())


main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
