"""How a start fails: one line, and an exit code that tells whether a restart can help."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from flanneld_py.cli.daemon import EX_CONFIG, EX_USAGE, OPEN_FILES, explain
from flanneld_py.errors import FlanneldError, HostError, KernelError, Refused, UsageError

LIMITED = {
    "files": (OSError(errno.EMFILE, "Too many open files"), "EMFILE", "ulimit -n"),
    "files of the host": (OSError(errno.ENFILE, "Too many open files in system"), "ENFILE", "fs.file-max"),
    "threads": (RuntimeError("can't start new thread"), "EAGAIN", "ulimit -u"),
    "memory": (MemoryError(), "ENOMEM", "ulimit -v"),
    "memory for a library": (
        ImportError("x.so: failed to map segment from shared object"),
        "ENOMEM",
        "ulimit -v",
    ),
    "files for a library": (ImportError("x.so: cannot open: Too many open files"), "EMFILE", "ulimit -n"),
}


@pytest.mark.parametrize("case", LIMITED)
def test_a_limit_is_named_with_what_raises_it(case: str) -> None:
    error, name, advice = LIMITED[case]
    text, code = explain(error)
    assert code == EX_CONFIG
    assert f"({name}); raise the" in text
    assert advice in text


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O\nerror"), RuntimeError("x"), ImportError("no y")])
def test_what_is_unknown_is_a_defect(error: Exception) -> None:
    text, code = explain(error)
    assert code == os.EX_SOFTWARE
    assert type(error).__name__ in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), EX_USAGE),
        (HostError("x"), EX_CONFIG),
        (Refused("x"), EX_CONFIG),
        (KernelError("x"), os.EX_SOFTWARE),
    ],
)
def test_exit_codes(error: FlanneldError, code: int) -> None:
    assert error.exit_code == code


def start(script: str, *wrapper: str) -> subprocess.CompletedProcess[str]:
    """`script` has the module as `start`, before its `main`."""
    program = f"import os, threading\nimport flanneld_py.cli.daemon as start\n{script}\nstart.main([])"
    return subprocess.run(
        [*wrapper, sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )


def test_a_start_that_hangs_is_given_up() -> None:
    ended = start("start.START_SECONDS = 1; start._from_command_line = lambda *_: threading.Event().wait()")
    assert ended.returncode == os.EX_SOFTWARE
    assert ended.stderr.startswith("flanneld-py: cannot start: RuntimeError: not done within 1 s; ")
    assert ended.stderr.count("\n") == 1


def test_a_low_soft_limit_is_raised_and_a_low_hard_one_named() -> None:
    script = """
import resource
def show(*_):
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
    return None, 0
start._from_command_line = show
"""
    ended = start(script, "prlimit", f"--nofile=20:{OPEN_FILES + 1}")
    assert (ended.returncode, ended.stdout) == (0, f"{OPEN_FILES}\n")
    ended = start(script, "prlimit", "--nofile=20:20")
    assert (ended.returncode, ended.stdout) == (EX_CONFIG, "")
    assert "only 20 open files are allowed" in ended.stderr


def test_a_cause_that_is_a_limit_is_named() -> None:
    script = """
from flanneld_py.errors import KernelError
def fail(*_):
    raise KernelError("cannot open a netlink socket: Too many open files") from OSError(24, "Too many")
start._from_command_line = fail
"""
    ended = start(script)
    assert ended.returncode == EX_CONFIG
    assert ended.stderr.startswith(
        "flanneld-py: cannot open a netlink socket: Too many open files; raise the"
    )


@pytest.mark.parametrize("closed", ["0", "1", "2"])
def test_a_closed_standard_stream_is_no_place_for_others(closed: str) -> None:
    script = f"""
def show(*_):
    assert os.path.sameopenfile({closed}, os.open(os.devnull, os.O_RDONLY))
    return None, 0
start._from_command_line = show
"""
    ended = start(script, "sh", "-c", f'exec "$@" {closed}>&-', "sh")
    assert ended.returncode == 0, ended.stderr


def test_too_little_address_space_is_named() -> None:
    ended = start("start._from_command_line = lambda *_: (None, 0)", "prlimit", f"--as={1 << 30}")
    assert ended.returncode == EX_CONFIG
    assert ended.stderr.startswith(f"flanneld-py: cannot start: only {1 << 30} bytes of address space are")
    assert "(ENOMEM); raise the limit on memory" in ended.stderr
