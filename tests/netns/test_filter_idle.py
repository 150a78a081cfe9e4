"""What following the packet filter costs while nothing happens."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.netns.observing import wait_status
from tests.netns.packet_filters import TOOLS, filter_config, rules_text, variant

if TYPE_CHECKING:
    import pytest

    from flanneld_py.lab import Daemon, Lab

IDLE = 60.0
EXECUTIONS = ("--seccomp-bpf", "--trace=execve")


def cpu_seconds(daemon: Daemon) -> float:
    """Of the process and of what it has started so far (proc_pid_stat(5): utime to cstime)."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def executions(daemon: Daemon) -> int:
    return daemon.trace.read_text().count("execve(")


def test_an_idle_minute_starts_no_process(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = dict(zip(TOOLS, lab.add_hosts("alpha", "beta", "gamma"), strict=True))
    for tool, host in hosts.items():
        lab.etcd.prefix = host.prefix = f"{lab.etcd.prefix}/{tool}"
        host.etcd.put_config(filter_config("vxlan", tool))
        host.start_daemon(["--ip-masq"], env=variant(host, tool), strace=EXECUTIONS).wait_ready()
    for tool, host in hosts.items():
        wait_status(host.daemon, "the daemon to be in sync", lambda seen: seen["state"] == "in sync")
        assert "10.5." in rules_text(host, tool)
    before = {tool: (cpu_seconds(host.daemon), executions(host.daemon)) for tool, host in hosts.items()}
    assert all(started for _, started in before.values()), "strace saw nothing"
    time.sleep(IDLE)
    with capsys.disabled():
        for tool, host in hosts.items():
            cpu, started = before[tool]
            spent = cpu_seconds(host.daemon) - cpu
            print(f"\n{tool}: {spent:.2f} s of CPU in an idle minute ({spent / IDLE:.2%})", end="")  # noqa: T201 - a figure of the run
            assert executions(host.daemon) == started
