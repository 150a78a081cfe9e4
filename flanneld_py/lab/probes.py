"""What pods see of the network: answers, losses, throughput, bytes intact."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from flanneld_py.lab.waiting import LabError, WaitTimeout, wait_for

if TYPE_CHECKING:
    from flanneld_py.lab.netns import Namespace

_HEADERS = {4: 20 + 8, 6: 40 + 8}
"""Bytes of the IP and ICMP headers, which ping's -s does not count."""
_LATE = 1.0
"""Seconds after which an answer counts as lost."""
_SUMMARY = re.compile(
    r"xmt/rcv/%loss = (?P<sent>\d+)/(?P<received>\d+)/\d+%(, min/avg/max = [\d.]+/(?P<rtt>[\d.]+)/)?"
)
_ANSWER = re.compile(r"^\[([\d.]+)\] \d+ bytes from .* icmp_seq=(\d+) ", re.MULTILINE)
_TIME = re.compile(r"^\[([\d.]+)\] ", re.MULTILINE)
_SEQUENCE = re.compile(r"icmp_seq=(\d+)\b")
_TRANSFER_END = Path(__file__).with_name("transfer_end.py")


@dataclass(frozen=True, slots=True)
class PingResult:
    """`rtt` in milliseconds on average, None without an answer."""

    sent: int
    received: int
    rtt: float | None = None

    @property
    def lost(self) -> int:
        return self.sent - self.received


@dataclass(frozen=True, slots=True)
class PingLoss:
    """What a ping in the background met."""

    sent: int
    lost: tuple[int, ...]
    """Sequence numbers, from 1."""
    longest_gap: float
    """Seconds without an answer, at most."""


def ping(
    source: Namespace,
    address: str,
    count: int,
    interval: float,
    *,
    size: int | None,
    df: bool,
    wait: float,
) -> PingResult:
    """See Namespace.ping.

    By fping: once one answer has come, iputils' ping waits for the last one no longer than two round trips.
    """
    argv = [
        "fping",
        "-q",
        "-i",
        "0",
        "-c",
        str(count),
        "-p",
        _milliseconds(interval),
        "-t",
        _milliseconds(wait),
    ]
    if size is not None:
        argv += ["-b", str(size - _HEADERS[ip_address(address).version])]
    if df:
        argv += ["-M"]
    # It exits with 1 when an answer is missing, and says everything on standard error.
    told = source.run(
        ["sh", "-c", '"$@" 2>&1 || [ $? -eq 1 ]', "sh", *argv, address], timeout=count * interval + wait + 30
    )
    summary = _SUMMARY.search(told)
    if summary is None:
        raise LabError(f"ping of {address} from {source.name} printed no summary: {told!r}")
    rtt = summary["rtt"]
    return PingResult(int(summary["sent"]), int(summary["received"]), float(rtt) if rtt else None)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:g}"


class PingRun:
    """A ping in the background that counts what was lost.

    `-O` makes ping name each request that is unanswered when the next one is sent, so that every request up
    to the last one named is known; answers to the last ones are awaited for a second before they count as
    lost.
    """

    def __init__(self, source: Namespace, address: str, interval: float) -> None:
        # Unanswered requests would wait in ping's output buffer for the next answer.
        command = ["stdbuf", "-oL", "ping", "-n", "-O", "-D", "-i", str(interval), address]
        self._process = source.spawn("ping", command)
        self._source = source
        self._what = f"{address} from {source.name}"

    def sent(self) -> int:
        """Requests known to be sent so far."""
        return max(_unwrapped([int(n) for n in _SEQUENCE.findall(self._text())]), default=0)

    def answered(self) -> int:
        """Requests answered so far."""
        return len(self._answers())

    def stop(self) -> PingLoss:
        """End the ping and tell what was lost of all that was sent before this call.

        Raises:
            LabError: ping itself failed, for example without a route.
        """
        stopped = time.time()
        sent = wait_for(self._sent_or_failed, 10, f"the first request of a ping of {self._what}")
        with contextlib.suppress(WaitTimeout):
            wait_for(lambda: not self._unanswered(sent), _LATE, "the last answers")
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)
        lost = self._unanswered(sent)
        answers = [at for at, sequence in self._answers() if sequence <= sent]
        times = sorted([float(_TIME.findall(self._text())[0]), *answers, stopped])
        self._source.discard(self._process)
        return PingLoss(sent, lost, max(later - earlier for earlier, later in itertools.pairwise(times)))

    def _text(self) -> str:
        """Only whole lines: ping may be in the middle of one."""
        text = self._process.stdout.read_text()
        return text[: text.rfind("\n") + 1]

    def _answers(self) -> list[tuple[float, int]]:
        found = _ANSWER.findall(self._text())
        return list(zip((float(at) for at, _ in found), _unwrapped([int(n) for _, n in found]), strict=True))

    def _unanswered(self, sent: int) -> tuple[int, ...]:
        return tuple(sorted(set(range(1, sent + 1)) - {sequence for _, sequence in self._answers()}))

    def _sent_or_failed(self) -> int:
        if not self._process.running:
            raise LabError(f"ping of {self._what} ended: {self._process.output().strip()}")
        return self.sent()


def _unwrapped(sequences: list[int]) -> list[int]:
    """ICMP sequence numbers have 16 bits; count on after 65535."""
    result: list[int] = []
    base = last = 0
    for sequence in sequences:
        if sequence < last - 0x8000:
            base += 0x10000
        last = sequence
        result.append(base + sequence)
    return result


@dataclass(frozen=True, slots=True)
class Throughput:
    """Received bits per second; retransmitted segments of the sender."""

    bits_per_second: float
    retransmits: int


def tcp_throughput(
    client: Namespace, server: Namespace, address: str, seconds: float = 3, streams: int = 1
) -> Throughput:
    """TCP by iperf3 from `client` to `server`, which is reached at `address`; all streams together."""
    listener = server.spawn("iperf3", ["iperf3", "--server", "--one-off", "--forceflush"])
    try:
        wait_for(listener.output, 10, "iperf3 to listen", lambda text: "Server listening" in text)
        command = ["iperf3", "--client", address, "--time", str(seconds), "--json"]
        command += ["--parallel", str(streams)]
        report = json.loads(client.run([*command, "--connect-timeout", "3000"], timeout=seconds + 30))
    finally:
        server.discard(listener)
    end = report["end"]
    return Throughput(end["sum_received"]["bits_per_second"], end["sum_sent"]["retransmits"])


class Transfer:
    """A TCP transfer of pseudo-random bytes whose SHA-256 is taken at both ends.

    Started at once; `seconds` spreads it over that time, so that it spans whatever is done meanwhile.
    """

    def __init__(
        self, client: Namespace, server: Namespace, address: str, size: int, seconds: float = 0
    ) -> None:
        self._client, self._server = client, server
        self._seconds = seconds
        python = [sys.executable, "-I", str(_TRANSFER_END)]
        self._receiver = server.spawn("receiver", [*python, "receive", address])
        port = wait_for(self._port, 10, f"a listener on {address}")
        self._sender = client.spawn("sender", [*python, "send", address, port, str(size), str(seconds)])

    def _port(self) -> str:
        if not self._receiver.running:
            raise LabError(f"no listener: {self._receiver.output().strip()}")
        return self._receiver.stdout.read_text().partition("\n")[0]

    def finish(self, timeout: float = 30) -> int:
        """Wait for the end; the number of bytes, which arrived as they were sent.

        Raises:
            LabError: an end failed, was not done `timeout` seconds after its time, or got other bytes.
        """
        try:
            codes = [end.wait(self._seconds + timeout) for end in (self._sender, self._receiver)]
            if any(codes):
                raise LabError(f"transfer failed: {self._sender.output()} {self._receiver.output()}")
            sent = self._sender.stdout.read_text().split()
            received = self._receiver.stdout.read_text().split()[1:]
            if sent != received:
                raise LabError(f"transfer differs: sent {sent}, received {received} (bytes, SHA-256)")
            return int(sent[0])
        finally:
            self._client.discard(self._sender)
            self._server.discard(self._receiver)
