"""What a start does not need is not read, and is all there when somebody asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flanneld_py.cli.putoff import UNUSED

START = """
import sys
from flanneld_py.cli.putoff import put_off
put_off()
import flanneld_py.daemon.log, flanneld_py.daemon.run
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", START + script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_daemon_reads_none_of_them() -> None:
    assert run("print(*sorted(n for n in sys.modules if n.startswith('asyncio.')))").strip() == ""
    kinds = run(f"print(*(type(sys.modules[name]).__name__ for name in {UNUSED!r}))").split()
    assert kinds == ["_Later"] * len(UNUSED)


@pytest.mark.parametrize(
    "script",
    [
        "import asyncio; asyncio.run(asyncio.sleep(0))",
        "import asyncio.events; asyncio.events.get_event_loop_policy()",
        "from asyncio import sleep; sleep",
        "import grpc.aio; grpc.aio.insecure_channel",
        "import grpc; grpc.aio.insecure_channel",
        "import ssl; ssl.create_default_context().load_default_certs()",
        "import tenacity; tenacity.retry(stop=tenacity.stop_after_attempt(1))(print)()",
        "from google.protobuf.internal import python_message; python_message.GeneratedProtocolMessageType",
    ],
)
def test_whoever_asks_gets_the_module_itself(script: str) -> None:
    run(script)
