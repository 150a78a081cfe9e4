"""cni/flannel and the real daemon: the lease is used as soon as it is there, and its absence explained."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.cni import Runtime, finished
from tests.netns.observing import wait_problem
from tests.netns.scenes import FAMILIES, MTU, config, family_config

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.add_host("alpha")


def runtime_of(host: Host, wait: float = 0) -> Runtime:
    return Runtime(host, "1.1.0", delegate={"ipMasq": False}, waitSeconds=wait)


def refusal(host: Host) -> str:
    """The message of an ADD, which STATUS has as well."""
    runtime = runtime_of(host)
    error = runtime.container().refused_add()
    assert error["code"] == 999
    assert error["details"] == f"there is no {host.subnet_file}"
    status = runtime.status().error
    assert status["code"] == 50
    without_age = [re.sub(r"for \d+ s", "", text) for text in (status["msg"], error["msg"])]
    assert without_age[0] == without_age[1]
    said: str = error["msg"]
    return said


@pytest.mark.parametrize(("backend", "families"), MTU)
def test_containers_on_two_hosts_reach_each_other(lab: Lab, backend: str, families: str) -> None:
    lab.etcd.put_config(family_config(backend, families))
    hosts = lab.add_hosts("alpha", "beta", families=FAMILIES[families])
    for daemon in [host.start_daemon() for host in hosts]:
        daemon.wait_ready()
    one, other = (runtime_of(host).container() for host in hosts)
    one.add()
    for address in other.add():
        wait_for(partial(one.ping, address.partition("/")[0], 1), 5, address, lambda seen: seen.received)


def test_add_waits_for_a_daemon_that_is_about_to_have_a_lease(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("host-gw"))
    container = runtime_of(alpha, wait=20).container()
    child = container.start_add()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    alpha.start_daemon().wait_ready()
    assert finished(child).result["ips"]


def test_no_daemon(alpha: Host) -> None:
    assert f"no daemon has told its status in {alpha.run_directory}; start it" in refusal(alpha)


def test_etcd_is_down(lab: Lab, alpha: Host) -> None:
    lab.etcd.stop()
    wait_problem(alpha.start_daemon(), "registry-unreachable")
    endpoint = lab.etcd.endpoint.removeprefix("http://")
    assert re.search(
        rf"waiting for etcd {endpoint}: connection refused, for \d+ s \(start etcd", refusal(alpha)
    )


def test_there_is_no_config(alpha: Host) -> None:
    wait_problem(alpha.start_daemon(), "config-missing")
    assert re.search(
        r"waiting: no network config at \S+/config; .* for \d+ s \(ETCDCTL_API=3", refusal(alpha)
    )


@pytest.mark.parametrize(
    ("network", "code", "part"),
    [
        ({"Network": "10.5.0.0/40"}, "config-invalid", "10.5.0.0/40"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlann"}}, "config-invalid", "vxlann"),
    ],
)
def test_the_config_is_wrong(lab: Lab, alpha: Host, network: dict[str, Any], code: str, part: str) -> None:
    lab.etcd.put_config(network)
    wait_problem(alpha.start_daemon(), code)
    assert re.search(rf"waiting: .*{part}.*, for \d+ s", refusal(alpha))


def test_all_subnets_are_taken(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("host-gw", SubnetMin="10.5.100.0", SubnetMax="10.5.100.0"))
    lab.add_host("beta").start_daemon().wait_ready()
    wait_problem(alpha.start_daemon(), "lease-waiting")
    assert re.search(r"waiting: .*, for \d+ s", refusal(alpha))


def test_the_interface_is_away(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("host-gw"))
    alpha.iface = "eth7"
    assert alpha.start_daemon().wait_exit() == 78
    assert re.search(r"the daemon does not run: --iface 'eth7': .*, for \d+ s \(", refusal(alpha))


def test_the_daemon_was_stopped(alpha: Host) -> None:
    daemon = alpha.start_daemon()
    wait_problem(daemon, "config-missing")
    daemon.terminate()
    assert "the daemon was stopped; start it" in refusal(alpha)


def test_the_daemon_was_killed(alpha: Host) -> None:
    daemon = alpha.start_daemon()
    wait_problem(daemon, "config-missing")
    pid = daemon.pid
    daemon.kill()
    said = refusal(alpha)
    assert f"the daemon (pid {pid}) is gone; start it" in said
    assert "no network config" in said
