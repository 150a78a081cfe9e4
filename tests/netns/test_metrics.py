"""/metrics of a real daemon: what it counts has happened, and what it says is so."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flanneld_py.lab import wait_for
from tests.netns.observing import wait_status
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import config, overlay
from tests.netns.test_command_line import CONFIGURATION, run

if TYPE_CHECKING:
    from flanneld_py.lab import Daemon, Host, Lab

PORT, HEALTH_PORT = 8472, 8471
USAGE = 2
CLIENT = """
import sys, urllib.error, urllib.request
url, accept = sys.argv[1:]
try:
    request = urllib.request.Request(url, headers={"Accept": accept})
    print(urllib.request.urlopen(request, timeout=5).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""


def fetch(host: Host, path: str = "/metrics", address: str = f"127.0.0.1:{PORT}", accept: str = "") -> str:
    return host.run(["python3", "-c", CLIENT, f"http://{address}{path}", accept])


def metrics(host: Host) -> dict[tuple[str, ...], float]:
    """(name without prefix, values of its labels by their names …) → value."""
    return {
        (sample.name.removeprefix("flanneld_"), *dict(sorted(sample.labels.items())).values()): sample.value
        for family in text_string_to_metric_families(fetch(host))
        for sample in family.samples
    }


def wait_metric(host: Host, *name: str, value: float) -> None:
    wait_for(lambda: metrics(host).get(name), 15, f"{name} to be {value}", lambda found: found == value)


def start(host: Host, *args: str) -> Daemon:
    return host.start_daemon([f"--metrics-addr=:{PORT}", *args])


def listening(host: Host, port: int) -> list[str]:
    return [line.split()[3] for line in host.run(["ss", "-Hltn"]).splitlines() if f":{port} " in line]


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.add_host("alpha")


def test_the_life_of_a_daemon(lab: Lab, alpha: Host) -> None:
    daemon = start(alpha)
    wait_status(daemon, "no config", lambda status: status["problems"])
    found = metrics(alpha)
    assert (found["ready",], found["registry_up",], found["lease_state", "none"]) == (0, 1, 1)
    lab.etcd.put_config(config("vxlan"))
    daemon.wait_ready()
    wait_metric(alpha, "ready", value=1)
    now, found = time.time(), metrics(alpha)
    assert now - 60 < found["registry_last_sync_timestamp_seconds",] < now + 1
    assert abs(found["lease_expiry_timestamp_seconds",] - now - 86_400) < 60
    assert found["lease_state", "held"] == found["health_reporter", "ready", "lease"] == 1
    assert found["registry_resyncs_total", "start"] == 1
    assert found["events_total", "put"] == 2  # the config, and our own record
    assert found["registry_request_duration_seconds_count", "LeaseGrant"] == 1
    assert found["kernel_objects", "links"] == 1
    assert (found["mtu_bytes", "overlay"], found["mtu_bytes", "underlay"]) == (1450, 1500)
    assert found["process_start_time_seconds",] < now
    assert listening(alpha, PORT) == [f"127.0.0.1:{PORT}"]
    assert daemon.terminate() == 0
    assert not listening(alpha, PORT)


def test_peers_bad_records_and_drift(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan"))
    start(alpha).wait_ready()
    peer, other = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, "vxlan", put=[peer])
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.5.9.0-24", '{"PublicIP":"7"}')
    wait_metric(alpha, "peers", "accepted", value=1)
    wait_metric(alpha, "registry_bad_records", value=1)
    before = metrics(alpha)
    assert before["drift_repaired_total", "routes"] == 0
    alpha.run(["ip", "route", "del", peer.subnet])
    wait_metric(alpha, "drift_repaired_total", "routes", value=1)
    after = metrics(alpha)
    assert after["reconcile_duration_seconds_count",] > before["reconcile_duration_seconds_count",]
    assert after["drift_current", "routes"] == 0
    # A stranger's route stands where a peer's should.
    alpha.run(["ip", "route", "add", other.subnet, "dev", "eth0"])
    change_peers(lab.etcd, "vxlan", put=[other])
    wait_metric(alpha, "drift_current", "routes", value=1)
    assert metrics(alpha)["reconcile_failures_total", "routes"] >= 1
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/10.5.9.0-24")
    wait_metric(alpha, "registry_bad_records", value=0)


def test_etcd_stops(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("vxlan"))
    start(alpha, "--subnet-lease-ttl=5s").wait_ready()
    wait_for(lambda: metrics(alpha)["lease_renewals_total", "ok"], 10, "a renewal", lambda count: count >= 1)
    synced = metrics(alpha)["registry_last_sync_timestamp_seconds",]
    stopped = time.time()
    lab.etcd.stop()
    wait_metric(alpha, "registry_up", value=0)
    wait_metric(alpha, "ready", value=0)
    wait_metric(alpha, "lease_state", "lost", value=1)
    found = metrics(alpha)
    assert synced <= found["registry_last_sync_timestamp_seconds",] <= stopped + 1
    assert found["lease_renewals_total", "failed"] >= 1
    assert found["health_reporter", "ready", "registry"] == 0
    assert found["health_reporter", "live", "threads"] == 1
    lab.etcd.start()
    wait_metric(alpha, "ready", value=1)


def test_packets_through_the_overlay(lab: Lab) -> None:
    alpha, beta = overlay(lab, "vxlan", "alpha", "beta")
    assert alpha.daemon.terminate() == 0
    start(alpha).wait_ready()
    before = metrics(alpha)
    alpha.pod.run(["ping", "-c", "5", "-i", "0.01", "-W", "2", beta.pod.address])
    after = metrics(alpha)
    for direction in ("rx", "tx"):
        name = ("tunnel_packets_total", direction)
        assert after[name] - before[name] >= 5
        assert after["tunnel_bytes_total", direction] - before["tunnel_bytes_total", direction] >= 5 * 84


def test_both_on_one_address(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("host-gw"))
    address = f"{alpha.address}:{HEALTH_PORT}"
    flags = [f"--healthz-ip={alpha.address}", f"--healthz-port={HEALTH_PORT}", f"--metrics-addr={address}"]
    daemon = alpha.start_daemon(flags)
    daemon.wait_ready()
    assert listening(alpha, HEALTH_PORT) == [address]
    assert fetch(alpha, "/healthz", address).startswith("flanneld is running\n")
    assert 'flanneld_lease_state{state="held"} 1.0' in fetch(alpha, "/metrics", address)
    assert fetch(alpha, "/metrics", address, "application/openmetrics-text").rstrip().endswith("# EOF")
    assert daemon.terminate() == 0
    # Apart, each has its own pages only.
    daemon = start(alpha, f"--healthz-port={HEALTH_PORT}")
    daemon.wait_ready()
    assert [fetch(alpha, "/healthz").strip(), fetch(alpha, "/metrics", address).strip()] == ["404", "404"]


def test_off_without_a_port(lab: Lab, alpha: Host) -> None:
    lab.etcd.put_config(config("host-gw"))
    alpha.start_daemon(["--metrics-addr=127.0.0.1"]).wait_ready()
    assert alpha.run(["ss", "-Hltn"]).strip() == ""


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (
            ["--metrics-addr=9100"],
            USAGE,
            "--metrics-addr '9100': expected an IP address with a port, ",
        ),
        (
            ["--metrics-addr=:70000"],
            USAGE,
            "--metrics-addr ':70000': port 70000: expected a port up to 65535",
        ),
        (
            [f"--metrics-addr=:{PORT}", f"--healthz-port={PORT}"],
            USAGE,
            f"--metrics-addr ':{PORT}': the health server has that port on 0.0.0.0; choose another port, or ",
        ),
        (
            [f"--metrics-addr=192.0.2.199:{PORT}"],
            CONFIGURATION,
            f"--metrics-addr 192.0.2.199:{PORT}: cannot listen there: Cannot assign requested address; ",
        ),
    ],
)
def test_an_address_that_cannot_be_meant_or_had(alpha: Host, flags: list[str], code: int, said: str) -> None:
    ended = run(alpha, *alpha.flags, *flags)
    assert ended.code == code
    assert ended.line.startswith(f"flanneld-py: {said}")
    assert not os.path.lexists(alpha.subnet_file)


def test_an_address_in_use(alpha: Host) -> None:
    start(alpha)
    wait_for(lambda: listening(alpha, PORT), 10, "the metrics server")
    second = alpha.directory / "second"
    flags = [f"--subnet-file={second}/subnet.env", f"--state-dir={second}", "--etcd-prefix=/other/network"]
    ended = run(alpha, *alpha.flags, *flags, f"--metrics-addr=127.0.0.1:{PORT}")
    assert (ended.code, ended.line) == (
        CONFIGURATION,
        f"flanneld-py: --metrics-addr 127.0.0.1:{PORT}: cannot listen there: Address already in use; choose "
        "another, or stop what uses it",
    )
