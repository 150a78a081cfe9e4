"""Docker's options: one table for `flannelctl docker-opts` and for mk-docker-opts.sh in every shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.dockeropts import find_gateway, read_variables, render_docker_opts
from flanneld_py.core.hostfiles import parse_environment_file

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "systemd/mk-docker-opts.sh"
SHELLS = {
    name: (*command, str(SCRIPT))
    for name, command in {"sh": ("sh",), "bash": ("bash",), "busybox": ("busybox", "sh")}.items()
    if shutil.which(command[0])
}
CTL = (sys.executable, "-m", "flanneld_py.cli.ctl.main", f"--env-file={os.devnull}", "docker-opts")
PROGRAMS = {"flannelctl": CTL, **SHELLS}

ENV = "FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
INDIVIDUAL = (
    'DOCKER_OPT_BIP="--bip=10.1.74.1/24"\nDOCKER_OPT_IPMASQ="--ip-masq=true"\nDOCKER_OPT_MTU="--mtu=1472"\n'
)
OPTIONS = " --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"
COMBINED = f'DOCKER_OPTS="{OPTIONS}"\n'


@dataclass(frozen=True)
class Case:
    written: str
    """What stands in the output file."""
    args: Sequence[str] = ()
    env: str | None = ENV
    """The text of subnet.env; None: there is no such file."""
    environ: dict[str, str] = field(default_factory=dict)


CASES = {
    "T58 default": Case(INDIVIDUAL + COMBINED),
    "T58 individual": Case(INDIVIDUAL, ["-i"]),
    "T58 combined": Case(COMBINED, ["-c"]),
    "both asked for": Case(INDIVIDUAL + COMBINED, ["-ic"]),
    "T59 key": Case(f'{INDIVIDUAL}CUSTOM_KEY="{OPTIONS}"\n', ["-k", "CUSTOM_KEY"]),
    "T59 key of the combined line alone": Case(f'CUSTOM_KEY="{OPTIONS}"\n', ["-c", "-kCUSTOM_KEY"]),
    "the daemon's own file": Case(
        'DOCKER_OPTS=" --bip=10.5.34.1/24 --ip-masq=false --mtu=1450"\n',
        ["-c"],
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_IPV6_NETWORK=fd00:5::/48\n"
        "FLANNEL_IPV6_SUBNET=fd00:5:0:34::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    ),
    "without ip-masq": Case('DOCKER_OPTS=" --bip=10.1.74.1/24 --mtu=1472"\n', ["-c", "-m"]),
    "without ip-masq its value does not matter": Case(
        'DOCKER_OPTS=" --mtu=9"\n', ["-cm"], "FLANNEL_IPMASQ=tea\nFLANNEL_MTU=9\n"
    ),
    "options before": Case(
        f'DOCKER_OPTS="-g /srv/docker {OPTIONS}"\n', ["-c"], environ={"DOCKER_OPTS": "-g /srv/docker"}
    ),
    "options before, under another key": Case(
        f'DOCKER_NETWORK="--icc {OPTIONS}"\n',
        ["-c", "-k", "DOCKER_NETWORK"],
        environ={"DOCKER_NETWORK": "--icc"},
    ),
    "an option by another program": Case(
        'A_DOCKER_OPT_DNS="--dns=10.0.0.1 --dns=10.0.0.2"\n'
        f'{INDIVIDUAL}DOCKER_OPTS=" --dns=10.0.0.1 --dns=10.0.0.2{OPTIONS}"\n',
        environ={
            "A_DOCKER_OPT_DNS": "--dns=10.0.0.1 --dns=10.0.0.2",
            "OTHER": "DOCKER_OPT_X=1\nDOCKER_OPT_Y=2",
        },
    ),
    "ours replaces what was there": Case(INDIVIDUAL, ["-i"], environ={"DOCKER_OPT_BIP": "--bip=old"}),
    "quotes and dollars stay what they are": Case(
        'DOCKER_OPTS="--log-opt tag=\\"\\$x\\" --label a=b\\\\c\\`d  --mtu=9"\n',
        ["-c"],
        "FLANNEL_MTU=9\n",
        {"DOCKER_OPTS": '--log-opt tag="$x" --label a=b\\c`d'},
    ),
    "no file, all in the environment": Case(
        COMBINED,
        ["-c"],
        None,
        {"FLANNEL_SUBNET": "10.1.74.1/24", "FLANNEL_MTU": "1472", "FLANNEL_IPMASQ": "false"},
    ),
    "the file wins over the environment": Case(COMBINED, ["-c"], environ={"FLANNEL_MTU": "9000"}),
    "no file and nothing in the environment": Case('DOCKER_OPTS=""\n', env=None),
    "an empty file": Case("", ["-i"], ""),
    "empty values": Case('DOCKER_OPTS=""\n', ["-c"], "FLANNEL_SUBNET=\nFLANNEL_MTU=\nFLANNEL_IPMASQ=\n"),
    "IPv6 only": Case(
        'DOCKER_OPTS=" --ip-masq=false --mtu=1430"\n',
        ["-c"],
        "FLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET=fd00:5:0:34::1/64\nFLANNEL_MTU=1430\n"
        "FLANNEL_IPMASQ=true\n",
    ),
    "quotes, comments, export, other variables": Case(
        COMBINED,
        ["-c"],
        "# flannel\n\nexport FLANNEL_SUBNET='10.1.74.1/24'\n"
        'FLANNEL_MTU="1472" # bytes\nFLANNEL_IPMASQ=false # it is off\nX=1\n',
    ),
}


def run(
    program: Sequence[str], folder: Path, case: Case, *more: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    source, output = folder / "sub net.env", folder / "docker opts.env"
    if case.env is not None:
        source.write_text(case.env)
    argv = [*program, "-f", str(source), "-d", str(output), *case.args, *more]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **case.environ}
    done = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    return done, output


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_is_written(program: Sequence[str], case: Case, tmp_path: Path) -> None:
    done, output = run(program, tmp_path, case)
    assert (done.returncode, output.read_text()) == (0, case.written)
    known = "FLANNEL_SUBNET=1" in (case.env or "").replace("'", "") or "FLANNEL_SUBNET" in case.environ
    assert done.stderr.count("\n") == (0 if known else 1)
    assert known or "no FLANNEL_SUBNET in " in done.stderr


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_shorter_text_leaves_nothing_of_the_longer_one(program: Sequence[str], tmp_path: Path) -> None:
    run(program, tmp_path, CASES["T58 default"])
    _, output = run(program, tmp_path, CASES["T58 combined"])
    assert output.read_text() == COMBINED


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_ip_masq_that_is_neither_true_nor_false(program: Sequence[str], tmp_path: Path) -> None:
    run(program, tmp_path, CASES["T58 combined"])
    done, output = run(program, tmp_path, Case("", env="FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_IPMASQ=tea\n"))
    assert done.returncode == 1
    assert "FLANNEL_IPMASQ=tea: expected true or false" in done.stderr
    assert done.stderr.count("\n") == 1
    assert output.read_text() == COMBINED, "the file of before is better than an empty one"


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_an_output_that_cannot_be_written(program: Sequence[str], tmp_path: Path) -> None:
    done, _ = run(program, tmp_path, CASES["T58 default"], "-d", f"{tmp_path}/absent/docker.env")
    assert done.returncode == 1
    assert f"{tmp_path}/absent/docker.env: " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["", "1A", "A-B", "A B", "a$(touch gone)"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_key_that_is_no_variable(program: Sequence[str], key: str, tmp_path: Path) -> None:
    done, output = run(program, tmp_path, CASES["T58 default"], "-k", key)
    assert done.returncode == (2 if program is CTL else 1)
    assert "expected the name of a variable, such as DOCKER_OPTS" in done.stderr
    assert not output.exists()
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("program", SHELLS.values(), ids=SHELLS)
@pytest.mark.parametrize("args", [["-h"], ["-?"], ["-x"], ["-f"], ["tea"]], ids=" ".join)
def test_usage_of_the_script(program: Sequence[str], args: list[str], tmp_path: Path) -> None:
    done = subprocess.run([*program, *args], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "usage: mk-docker-opts.sh [-f FILE] [-d FILE] [-i] [-c] [-k KEY] [-m]\n" in done.stderr
    assert all(f"\n  -{letter} " in done.stderr for letter in "fdickm")


def test_a_file_without_a_slash_is_not_searched_in_the_path(tmp_path: Path) -> None:
    (tmp_path / "subnet.env").write_text(ENV)
    for name, program in PROGRAMS.items():
        argv = [*program, "-f", "subnet.env", "-d", name, "-c"]
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        subprocess.run(argv, cwd=tmp_path, check=True, env=environ)
        assert (tmp_path / name).read_text() == COMBINED


def test_flannelctl_executes_nothing(tmp_path: Path) -> None:
    env = ENV + f"X=$(touch {tmp_path}/a)\ntouch {tmp_path}/b\n"
    done, output = run(CTL, tmp_path, Case("", ["-c"], env))
    assert (done.returncode, output.read_text()) == (0, COMBINED)
    assert {path.name for path in tmp_path.iterdir()} == {"sub net.env", "docker opts.env"}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_systemd_reads_back_what_was_meant(value: str) -> None:
    text = render_docker_opts({"K": value, "FLANNEL_MTU": "9"}, key="K")
    assert parse_environment_file(text) == {"DOCKER_OPT_MTU": "--mtu=9", "K": f"{value}  --mtu=9"}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_it_back_too(shell: str, tmp_path: Path) -> None:
    value = "a \"b\" 'c' $d `e` \\f \\\\ *\n{g}"
    file = tmp_path / "opts.env"
    file.write_text(render_docker_opts({"K": value}, key="K", individual=False))
    argv = [*SHELLS[shell][:-1], "-c", '. "$1"; printf %s "$K"', "-", str(file)]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == f"{value} "


# --- the route ------------------------------------------------------------------------------------

ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\tFE0200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
flannel.1\t004A010A\t004A010A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
cni0\t0022050A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
"""Of a little-endian kernel: default, the underlay, 10.1.74.0/24 by a gateway, 10.5.34.0/24 without."""


@pytest.mark.skipif(sys.byteorder == "big", reason="the table is a little-endian kernel's")
@pytest.mark.parametrize(
    ("subnet", "gateway"),
    [
        ("10.1.74.1/24", "10.1.74.0 dev flannel.1"),
        ("10.1.74.1/25", None),
        ("10.1.75.1/24", None),
        ("10.5.34.1/24", None),
        ("0.0.0.0/0", "192.0.2.254 dev eth0"),
        ("", None),
        ("tea", None),
    ],
)
def test_the_subnet_of_another_host(subnet: str, gateway: str | None) -> None:
    assert find_gateway(subnet, ROUTES) == gateway
    assert find_gateway(subnet, "") is None


def test_a_comment_behind_a_value_is_none_of_it() -> None:
    assert read_variables({"A": "1"}, "FLANNEL_MTU=9 # b\nB='c # d'\n") == {
        "A": "1",
        "FLANNEL_MTU": "9",
        "B": "c # d",
    }


# --- Docker's service -----------------------------------------------------------------------------


def test_a_restart_of_docker_does_not_collect_the_options_of_the_starts_before(tmp_path: Path) -> None:
    """With systemd's drop-in, which reads the file that it wrote at the start before into its environment."""
    drop_in = (ROOT / "systemd/docker.service.d/flannel.conf").read_text()
    (line,) = (line for line in drop_in.splitlines() if "mk-docker-opts.sh -" in line)
    output = tmp_path / "opts.env"
    argv = line.removeprefix("ExecStartPre=").replace("/usr/local/bin/mk-docker-opts.sh", str(SCRIPT)).split()
    argv[argv.index("-d") + 1] = str(output)
    environ = {"PATH": os.environ["PATH"], "DOCKER_OPTS": "--icc=false"}
    environ |= {"FLANNEL_SUBNET": "10.1.74.1/24", "FLANNEL_MTU": "1472", "FLANNEL_IPMASQ": "false"}
    for _ in range(2):
        subprocess.run(argv, check=True, env=environ)
        environ |= parse_environment_file(output.read_text())
        assert environ["DOCKER_NETWORK_OPTIONS"] == OPTIONS
    assert environ["DOCKER_OPTS"] == "--icc=false"
    assert drop_in.rstrip().endswith("$DOCKER_OPTS $DOCKER_NETWORK_OPTIONS")
