"""`make bench` measures what it says it measures."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flanneld_py.lab import Lab, LabError, Transfer, wait_for
from flanneld_py.lab.bench import UNDERLAYS, Plan, bench, shown
from flanneld_py.lab.benchpaths import PATHS, PEER, ROUTES, peer_pair, routed_pair
from flanneld_py.lab.benchsamples import Sample
from flanneld_py.lab.capture import Capture
from flanneld_py.lab.datagrams import datagram_stream, round_trips
from flanneld_py.lab.process import marked
from flanneld_py.lab.workspace import directories

_FIGURE = re.compile(r"(\d+\.?\d*) \(\d+\.?\d* to \d+\.?\d*\) x(\d+\.\d+)")
_SAMPLE = Sample(
    tcp=10,
    tcp_cpu=1,
    tcp4=20,
    small=80,
    small_lost=0,
    small_cpu=20,
    large=80,
    large_lost=0,
    trip=60,
    trip_p99=90,
)


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A program that is started as flannel's daemon is, with flannel's flags and no others."""
    program = tmp_path / "flanneld"
    program.write_text(
        f"""#!/bin/sh
for flag; do case $flag in -subnet-file=*) run=$(dirname "${{flag#*=}}") ;; *) ;; esac; done
exec {shlex.quote(sys.executable)} -m flanneld_py.cli.daemon "$@" --state-dir="$run/state" --node-id=\
"$(echo "$run" | md5sum | cut -c-32)"
"""
    )
    program.chmod(0o755)
    return program


def test_every_path_is_measured_on_both_underlays(peer: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    bench(Plan(rounds=1, seconds=1, trips=200, peer=peer), lines.append, tmp_path / "samples.json")
    added = r"[0-9.]+ ms by bridge alone, [0-9.]+ ms by flannel, .* -?[0-9.]+ ms more .* ratio [0-9.]+ .*"
    for line, families in zip(lines[1:], ("IPv4", "dual-stack"), strict=False):
        assert re.fullmatch(f"CNI ADD, {families}: {added}", line)
    starts = [number for number, line in enumerate(lines) if line.startswith("Underlay: ")]
    assert len(starts) == len(UNDERLAYS)
    for start in starts:
        shown_below = lines[start : start + 30]
        for path in (ROUTES, *PATHS, PEER):
            rows = [line for line in shown_below if line.startswith(f"{path} ") and "x" in line]
            figures = [_FIGURE.findall(row) for row in rows][:3]
            assert [len(row) for row in figures] == [3, 3, 2], path
            assert all(float(figure) > 0 for row in figures for figure, _ in row), path
    assert '"tcp4"' in (tmp_path / "samples.json").read_text()


def test_ratios_are_those_of_the_same_round() -> None:
    """Rounds twice as fast for all paths change no ratio."""
    vxlan = [_SAMPLE, replace(_SAMPLE, tcp=20), _SAMPLE]
    udp = [replace(_SAMPLE, tcp=5), replace(_SAMPLE, tcp=10), replace(_SAMPLE, tcp=5, trip=90)]
    lines = shown({"any": {"vxlan": vxlan, "udp native": udp}})
    rows = [_FIGURE.findall(line) for line in lines if line.startswith("udp native")]
    assert rows[0][0] == ("5.0", "0.50")
    assert "5.0 (5.0 to 10.0) x0.50" in "\n".join(lines)


def test_datagrams_are_counted_where_they_arrive(lab: Lab) -> None:
    pair = routed_pair(lab)
    address = pair.server.address
    whole = datagram_stream(pair.client, pair.server, address, 64, 0.3)
    assert whole.received == whole.sent > 1000
    lab.underlay.drop([f"ip daddr {address} numgen inc mod 4 0"])
    thinned = datagram_stream(pair.client, pair.server, address, 64, 0.3)
    assert thinned.lost == pytest.approx(0.25, abs=0.01)
    lab.underlay.drop([f"ip daddr {address}"])
    with pytest.raises(LabError, match="no answer"):
        round_trips(pair.client, pair.server, address, 3)


def test_ports_without_offloads_send_no_packet_larger_than_their_mtu(lab: Lab) -> None:
    pair = routed_pair(lab)
    host = pair.hosts[0]
    for on in (True, False, True):
        host.underlay.offload(host, on=on)
        for namespace, port in ((host, "eth0"), (lab.underlay, lab.underlay.port(host.name))):
            features = namespace.run(["ethtool", "-k", port])
            for name in ("tcp-segmentation-offload", "tx-udp-segmentation", "tx-udp_tnl-segmentation"):
                assert f"{name}: {'on' if on else 'off'}\n" in features
        capture = Capture(lab.underlay, lab.underlay.port(host.name), f"tcp and src {pair.client.address}")
        Transfer(pair.client, pair.server, pair.server.address, 1 << 20).finish()
        longest = max(packet["IP"].len for packet in capture.stop())
        assert longest > 1500 if on else longest == 1500


def test_a_peer_that_ends_is_shown_with_what_it_said(lab: Lab, tmp_path: Path) -> None:
    program = tmp_path / "peer"
    program.write_text("#!/bin/sh\necho no such flag; exit 3\n")
    with pytest.raises(LabError, match=r"BENCH_PEER=.*peer is not a program"):
        peer_pair(lab, program)
    program.chmod(0o755)
    with pytest.raises(LabError, match="peer ended with 3: no such flag"):
        peer_pair(lab, program)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    said = tmp_path / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flanneld_py.lab", "bench", "--rounds=1", "--seconds=1"], stdout=output
        )
        wait_for(said.read_text, 180, "the first sample", lambda text: "\n  plain routes" in text)
        made = _directories_of(process.pid)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert made
    assert not _directories_of(process.pid)
    assert not [pid for directory in made for pid in marked(directory)]


def _directories_of(pid: int) -> list[Path]:
    return [directory for directory in directories() if f".{pid}." in directory.name]


def test_a_peer_that_is_not_there_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(LabError, match="no program that can be executed"):
        bench(Plan(peer=tmp_path / "none"), lines.append)
    assert lines == []
