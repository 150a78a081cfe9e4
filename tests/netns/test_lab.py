"""The lab itself: it tells the truth, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flanneld_py.lab import CommandFailed, EtcdServer, Host, Lab, LabError, Transfer, WaitTimeout, wait_for
from flanneld_py.lab.capture import Capture
from flanneld_py.lab.process import command_line, marked
from flanneld_py.lab.workspace import Workspace, directories
from tests.netns.nobody import as_nobody

VICTIM = """
import json, signal
from flanneld_py.lab import Lab
lab = Lab()
a, b = lab.add_hosts("a", "b")
a.start_ping(b.address)
trace = ["strace", "-f", "-o", "/dev/null", "--", "setpriv", "--pdeathsig", "KILL", "--", "sleep", "600"]
b.spawn("traced", trace)
namespaces = [lab.underlay, a, b]
print(json.dumps([str(lab.workspace.directory), [n.holder_pid for n in namespaces]]), flush=True)
signal.pause()
"""


def machine_links() -> str:
    """The machine's own interfaces (not those of a namespace)."""
    return subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout


def inhabited() -> set[Path]:
    """The network namespaces of all processes."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(link.readlink())
        except OSError:
            continue
    return found


def write_subnet_env(host: Host, mtu: int = 1500) -> None:
    """What a daemon would write for host n: 10.5.n.0/24."""
    host.subnet_file.write_text(
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.{host.number}.1/24\nFLANNEL_MTU={mtu}\n"
        "FLANNEL_IPMASQ=false\n"
    )


@pytest.fixture
def joined(lab: Lab) -> list[Host]:
    """Two hosts with a pod each and hand-made routes between them."""
    hosts = lab.add_hosts("a", "b")
    for host in hosts:
        write_subnet_env(host)
        host.attach_pods()
    a, b = hosts
    a.ip("route", "add", "10.5.2.0/24", "via", b.address)
    b.ip("route", "add", "10.5.1.0/24", "via", a.address)
    return hosts


def test_a_killed_lab_leaves_nothing_and_the_next_one_removes_its_files() -> None:
    before = machine_links()
    victim = subprocess.Popen([sys.executable, "-c", VICTIM], stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout is not None
        directory, holders = json.loads(victim.stdout.readline())
        spaces = {Path(f"/proc/{pid}/ns/net").readlink() for pid in holders}
        assert len(spaces) == 3
        assert Path("/proc/self/ns/net").readlink() not in spaces
        wait_for(
            lambda: {name for pid in marked(Path(directory)) for name in command_line(pid)[:1]},
            10,
            "each of its processes to be executed",
            lambda names: {"cat", "ping", "strace", "sleep"} <= names and "setpriv" not in names,
        )
    finally:
        victim.kill()
        victim.communicate()

    wait_for(lambda: marked(Path(directory)), 10, "its processes to be gone", lambda left: not left)
    # A process that exits loses its environment, by which it is known, before its namespaces.
    wait_for(lambda: spaces & inhabited(), 10, "its namespaces to be empty", lambda left: not left)
    assert machine_links() == before
    assert Path(directory) in directories()
    Workspace().close()
    assert not [path for path in directories() if path.name == Path(directory).name]


def test_a_lab_that_is_alive_is_not_swept() -> None:
    workspace = Workspace()
    try:
        ours = [path for path in directories() if path.name == workspace.directory.name]
        Workspace().close()
        assert ours
        assert all(path.exists() for path in ours)
    finally:
        workspace.close()
    assert not any(path.exists() for path in ours)


def test_closing_a_lab_ends_children_of_children_too() -> None:
    workspace = Workspace()
    process = workspace.spawn("parent", ["sh", "-c", "sleep 600 & sleep 600 & wait"])
    wait_for(lambda: marked(workspace.directory), 5, "three processes", lambda pids: len(pids) == 3)
    workspace.close()
    assert not process.running
    assert marked(workspace.directory) == []


def test_hosts_reach_each_other_and_etcd_over_both_families(lab: Lab) -> None:
    a, b = lab.add_hosts("a", "b")
    assert a.ping(b.address).lost == 0
    assert a.ping(b.address6).lost == 0
    assert b.ping("192.0.2.254").lost == 0
    assert {route["dst"] for route in a.ip("route", "show", "dev", "eth0")} == {"default", "192.0.2.0/24"}
    (link,) = a.ip("link", "show", "eth0")
    assert (link["address"], link["mtu"]) == ("02:00:c0:00:02:01", 1500)


def test_two_segments_with_a_router_between(lab: Lab) -> None:
    a, c = lab.add_host("a"), lab.add_host("c", segment=1)
    assert (c.address, c.address6) == ("198.51.100.2", "2001:db8:0:1::2")
    for address, router in ((c.address, "192.0.2.254"), (c.address6, "2001:db8::fe")):
        assert a.ping(address).lost == 0
        (way,) = a.ip("route", "get", address)
        assert way["gateway"] == router
    result = c.ping(a.address, size=1500, df=True)
    assert result.lost == 0


@pytest.mark.parametrize(("family", "other"), [(4, 6), (6, 4)])
def test_a_host_may_have_one_family_only(lab: Lab, family: int, other: int) -> None:
    (host,) = lab.add_hosts("a", families=[family])
    routes = {version: host.ip(f"-{version}", "route", "show", "default") for version in (4, 6)}
    assert (len(routes[family]), len(routes[other])) == (1, 0)
    (endpoint,) = (flag for flag in host.flags if flag.startswith("--etcd-endpoints="))
    assert ("[2001:db8::fe]" in endpoint) == (family == 6)


def test_pods_have_the_leased_subnet_and_the_mtu_of_subnet_env(lab: Lab) -> None:
    (host,) = lab.add_hosts("a")
    write_subnet_env(host, mtu=1400)
    first, second = host.attach_pods(2)
    assert (first.address, second.address) == ("10.5.1.2", "10.5.1.3")
    assert first.ping(second.address, size=1400, df=True).lost == 0
    with pytest.raises(CommandFailed, match=r"message too long|mtu=1400"):
        first.run(["ping", "-c1", "-W0.2", "-M", "do", "-s", str(1401 - 28), second.address])
    host.remove_pods()
    assert [link["ifname"] for link in host.ip("link")] == ["lo", "eth0"]
    assert host.attach_pods()[0].ping("10.5.1.1").lost == 0


def test_a_ping_knows_exactly_which_requests_were_lost(lab: Lab, joined: list[Host]) -> None:
    a, b = joined
    # numgen counts from 0: the first, the fifth, … request.
    lab.underlay.drop([f"icmp type echo-request ip daddr {b.pod.address} numgen inc mod 4 0"])
    ping = a.pod.start_ping(b.pod.address)
    wait_for(ping.sent, 10, "40 requests", lambda n: n >= 40)
    loss = ping.stop()
    assert loss.sent >= 40
    assert loss.lost == tuple(range(1, loss.sent + 1, 4))


def test_a_ping_without_loss_counts_none(joined: list[Host]) -> None:
    a, b = joined
    ping = a.pod.start_ping(b.pod.address)
    wait_for(ping.answered, 10, "40 answers", lambda n: n >= 40)
    loss = ping.stop()
    assert loss.lost == ()
    assert loss.sent >= 40


def test_a_ping_counts_an_outage_up_to_its_end(lab: Lab, joined: list[Host]) -> None:
    a, b = joined
    ping = a.pod.start_ping(b.pod.address)
    wait_for(ping.answered, 10, "10 answers", lambda n: n >= 10)
    lab.underlay.cut(b)
    cut_at = time.monotonic()
    answered = ping.answered()
    wait_for(ping.sent, 10, "20 requests in vain", lambda n: n >= answered + 20)
    loss = ping.stop()
    assert len(loss.lost) >= 19
    assert loss.lost == tuple(range(loss.lost[0], loss.sent + 1))
    assert 0.1 < loss.longest_gap < time.monotonic() - cut_at + 0.1
    lab.underlay.mend(b)
    wait_for(lambda: a.pod.ping(b.pod.address, 1).received, 10, "an answer after mending")


def test_a_transfer_arrives_as_it_was_sent(joined: list[Host]) -> None:
    a, b = joined
    assert Transfer(a.pod, b.pod, b.pod.address, 3_000_000).finish() == 3_000_000


def test_a_transfer_that_cannot_finish_is_an_error(lab: Lab, joined: list[Host]) -> None:
    a, b = joined
    transfer = Transfer(a.pod, b.pod, b.pod.address, 1_000_000, seconds=0.5)
    lab.underlay.cut(b)
    with pytest.raises(LabError, match="had not ended"):
        transfer.finish(timeout=0.5)


def test_a_capture_shows_what_passed(lab: Lab, joined: list[Host]) -> None:
    a, b = joined
    capture = Capture(lab.underlay, lab.underlay.port("a"), "icmp[icmptype] == icmp-echo")
    assert a.pod.ping(b.pod.address, 1, size=777).received == 1
    capture.wait_packet()
    (packet,) = capture.stop()
    assert (packet["IP"].src, packet["IP"].dst, packet["IP"].len) == (a.pod.address, b.pod.address, 777)


def test_etcd_counts_requests(etcd: EtcdServer) -> None:
    before = etcd.requests()
    for number in range(2):
        etcd.put_config({"Network": f"10.{number}.0.0/16"})
    for _ in range(3):
        assert "10.1.0.0" in etcd.ctl("get", f"{etcd.prefix}/config")
    assert etcd.requests() - before == {"KV/Put": 2, "KV/Range": 3}


def test_etcd_can_freeze_die_and_forget(etcd: EtcdServer) -> None:
    etcd.put_config("one")
    etcd.pause()
    with pytest.raises(CommandFailed, match="had not ended"):
        etcd.ctl("get", f"{etcd.prefix}/config", timeout=0.3)
    etcd.resume()
    assert "one" in etcd.ctl("get", f"{etcd.prefix}/config")
    etcd.kill()
    with pytest.raises(CommandFailed):
        etcd.ctl("get", f"{etcd.prefix}/config", "--command-timeout=100ms", "--dial-timeout=100ms")
    etcd.start()
    assert "one" in etcd.ctl("get", f"{etcd.prefix}/config")
    assert etcd.stop() in {0, -signal.SIGTERM}
    etcd.start(empty=True)
    assert etcd.ctl("get", f"{etcd.prefix}/config") == ""


def test_notifications_are_read_at_once_and_kept_by_sender(lab: Lab) -> None:
    script = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "for n in range(50):\n"
        "    s.sendto(f'STATUS={sys.argv[1]} {n}'.encode(), os.environ['NOTIFY_SOCKET'])\n"
        "s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])"
    )
    (host,) = lab.add_hosts("a")
    env = {"NOTIFY_SOCKET": os.fspath(lab.notify.path)}
    one, two = (host.spawn("n", [sys.executable, "-IS", "-c", script, name], env=env) for name in ("x", "y"))
    assert (one.wait(10), two.wait(10)) == (0, 0)
    told = wait_for(
        lambda: [told.fields for told in lab.notify.received(one.pid)],
        5,
        "the last message",
        lambda told: {"READY": "1"} in told,
    )
    assert told[:-1] == [{"STATUS": f"x {n}"} for n in range(50)]
    # As from a process that is started now and gets the same pid.
    assert lab.notify.received(one.pid, since=time.monotonic()) == []


def test_a_reboot_keeps_the_disk_and_nothing_else(joined: list[Host]) -> None:
    a, b = joined
    a.state_directory.mkdir()
    (a.state_directory / "kept").touch()
    a.reboot()
    assert not a.subnet_file.exists()
    assert (a.state_directory / "kept").exists()
    assert [link["ifname"] for link in a.ip("link")] == ["lo", "eth0"]
    assert a.ping(b.address).lost == 0


def test_waiting_in_vain_names_what_was_awaited_and_what_was_seen() -> None:
    with pytest.raises(WaitTimeout, match=r"waited 0\.01 s for the moon; last seen: 'clouds'"):
        wait_for(lambda: "clouds", 0.01, "the moon", lambda seen: seen == "moon")


def test_a_failing_command_says_why(lab: Lab) -> None:
    with pytest.raises(CommandFailed, match='Device "eth7" does not exist'):
        lab.underlay.ip("link", "show", "dev", "eth7")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_cleans_up(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "flanneld_py.lab", "demo"]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert demo.stdout is not None
        ours = wait_for(lambda: [p for p in directories() if f".{demo.pid}." in p.name], 10, "its directory")
        while "$ flanneld-py" not in demo.stdout.readline():
            pass
        demo.send_signal(number)
        demo.communicate(timeout=20)
    finally:
        demo.kill()
        demo.communicate()
    assert demo.returncode == 128 + number
    assert not any(path.exists() for path in ours)
    assert [pid for path in ours for pid in marked(path)] == []


def test_the_demo_says_in_one_line_what_it_lacks() -> None:
    command = as_nobody("flanneld_py.lab.__main__", "demo")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == (
        "The demo cannot run here: network namespaces need root; run it with sudo, "
        "or in a privileged container\n"
    )
    assert done.stderr == ""


def test_a_daemon_is_found_behind_what_wraps_it(lab: Lab) -> None:
    lab.etcd.put_config({"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}})
    (host,) = lab.add_hosts("a")
    daemon = host.start_daemon(wrapper=["nice"], strace=["-e", "trace=sendto"])
    assert daemon.wait_ready() > 0
    assert daemon.pid != daemon.process.pid
    assert "flanneld_py.cli.daemon" in Path(f"/proc/{daemon.pid}/cmdline").read_text()
    assert daemon.status()["pid"] == daemon.pid
    assert daemon.log_lines()[0]["level"]
    assert daemon.kill() == -signal.SIGKILL
    assert "READY=1" in daemon.trace.read_text()
    again = host.start_daemon()
    again.wait_ready()
    assert again.pid == again.process.pid
    assert again.terminate() == 0


def test_a_daemon_that_exits_is_reported_with_its_last_words(lab: Lab) -> None:
    (host,) = lab.add_hosts("a")
    daemon = host.start_daemon(["--iface=eth7"], wrapper=["sh", "-c", "echo last words; exit 3"])
    with pytest.raises(LabError, match="host a exited with 3:\nlast words"):
        daemon.wait_ready()
    assert daemon.kill() == 3
    assert lab.report() == [("a: daemon-1.log (exited with 3)", "last words")]


def test_the_demo_passes() -> None:
    command = [sys.executable, "-m", "flanneld_py.lab", "demo", "--backend", "vxlan"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 8 checks passed" in done.stdout
    assert "VXLAN  VNI 1" in done.stdout
    assert "\033" not in done.stdout


def test_the_demo_says_what_failed_and_why(tmp_path: Path) -> None:
    (tmp_path / "grpc.py").write_text("raise ImportError('no gRPC for the daemon')\n")
    command = [sys.executable, "-m", "flanneld_py.lab", "demo", "--backend", "host-gw"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "FAILED: hosts join: the daemon of host a exited with" in done.stdout
    assert "ImportError: no gRPC for the daemon" in done.stdout
    assert "1 of 1 checks failed" in done.stdout
