"""Logs that nobody can take: a line may be lost, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

import pytest
import structlog

from flanneld_py.daemon import log
from flanneld_py.daemon.log import Output

PIPE_SIZE = 4096
"""The smallest there is."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Reading and writing end."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_lines_arrive_in_order_and_whole(pipe: tuple[int, int]) -> None:
    output = Output(pipe[1])
    for text in ("one\n", "two \udc80 ü\n"):
        output.write(text)
        output.flush()
    assert os.read(pipe[0], 100) == b"one\ntwo \\udc80 \xc3\xbc\n"
    assert output.dropped == 0


def test_a_reader_that_is_gone_costs_lines_only(pipe: tuple[int, int]) -> None:
    output = Output(pipe[1])
    os.close(pipe[0])
    for _ in range(3):
        output.write("line\n")
    assert output.dropped == 3


def test_a_stuck_reader_costs_lines_only_and_gets_whole_ones_later(pipe: tuple[int, int]) -> None:
    output = Output(pipe[1])
    begun = time.monotonic()
    for number in range(100):
        output.write(f"{number:04}{'x' * 995}\n")
    assert time.monotonic() - begun < 1
    assert output.dropped > 80
    assert not fcntl.fcntl(pipe[1], fcntl.F_GETFL) & os.O_NONBLOCK, "it is others' pipe, too"
    read = b""
    for number in range(100, 120):
        read += os.read(pipe[0], 1 << 20)
        output.write(f"{number:04}{'x' * 995}\n")
    lines = (read + os.read(pipe[0], 1 << 20)).decode().splitlines()
    assert {len(line) for line in lines[:-1]} == {999}
    assert [line[:4] for line in lines[:2]] == ["0000", "0001"]
    assert lines[-2][:4] >= "0115"


def test_a_line_longer_than_the_pipe_does_not_break_the_next(pipe: tuple[int, int]) -> None:
    output = Output(pipe[1])
    long, read = "x" * 20_000 + "\n", b""
    output.write(long)
    while not read.endswith(b"next\n"):
        read += os.read(pipe[0], 1 << 20)
        output.write("next\n")
    assert read.decode().splitlines()[0] + "\n" == long
    assert set(read.decode().splitlines()[1:]) == {"next"}


def test_a_stuck_journal() -> None:
    """Under systemd stderr is a stream socket (systemd.exec(5), StandardError=journal)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        output = Output(ours.fileno())
        begun = time.monotonic()
        while not output.dropped:
            output.write("x" * 999 + "\n")
            assert time.monotonic() - begun < 5
        theirs.close()
        output.write("line\n")
        assert output.dropped > 1
        assert output._socket is not None
        output._socket.close()


@pytest.mark.parametrize("how", ["full", "closed"])
def test_a_full_disk_and_a_closed_descriptor(how: str) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    if how == "closed":
        os.close(fd)
    output = Output(fd)
    output.write("line\n")
    assert output.dropped == 1
    if how == "full":
        os.close(fd)


def test_what_was_lost_is_told_with_the_next_line(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "Output", lambda: Output(pipe[1]))
    before = structlog.get_config()
    try:
        log.configure(0)
        logger = structlog.get_logger().bind(part="test")
        for number in range(100):
            logger.info("event", number=number, filler="x" * 100)
        lines = os.read(pipe[0], 1 << 20).splitlines()
        logger.info("event")
        last = json.loads(os.read(pipe[0], 1 << 20).splitlines()[-1])
    finally:
        structlog.configure(**before)
    whole = len(lines)
    assert 10 < whole < 100
    assert abs(last["dropped_before"] - (100 - whole)) <= 1
    assert list(last)[:4] == ["ts", "level", "part", "event"]
