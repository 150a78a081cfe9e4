"""ADD, CHECK, DEL, GC and STATUS of cni/flannel with Debian's bridge and host-local in real namespaces."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from flanneld_py.lab.process import command_line, marked
from tests.netns.cni import DEBIAN, Runtime, addresses, finished

if TYPE_CHECKING:
    from pathlib import Path

    from flanneld_py.lab import Host, Lab

IPV4 = ("FLANNEL_NETWORK=10.1.0.0/16", "FLANNEL_SUBNET=10.1.17.1/24")
IPV6 = ("FLANNEL_IPV6_NETWORK=fc00::/48", "FLANNEL_IPV6_SUBNET=fc00::1/64")
FILES = {"ipv4": IPV4, "dual-stack": IPV4 + IPV6, "ipv6": IPV6}
EXPECTED = {
    "ipv4": ["10.1.17.2/24"],
    "dual-stack": ["10.1.17.2/24", "fc00::2/64"],
    "ipv6": ["fc00::2/64"],
}
VERSIONS = ("0.4.0", "1.0.0", "1.1.0")
OLD_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1")
# A delegate that leaks what it had from host-local when it fails, and fails when it is told to.
LEAKY = f"""#!/bin/sh
conf=$(cat)
if [ -e "$0.fails-$CNI_COMMAND" ]; then
    if [ "$CNI_COMMAND" = ADD ]; then printf %s "$conf" | {DEBIAN}/host-local >/dev/null; fi
    echo '{{"cniVersion":"1.0.0","code":111,"msg":"made to fail"}}'
    exit 1
fi
printf %s "$conf" | {DEBIAN}/bridge
"""


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.add_host("alpha")


def prepared(host: Host, families: str = "ipv4", version: str = "1.0.0") -> Runtime:
    runtime = Runtime(host, version)
    runtime.write_lease(*FILES[families])
    return runtime


def leaky(runtime: Runtime) -> Path:
    """Make the delegate LEAKY; the file whose name with `.fails-VERB` behind it makes it fail."""
    runtime.folder.mkdir()
    plugin = runtime.folder / "leaky"
    plugin.write_text(LEAKY)
    plugin.chmod(0o755)
    runtime.path = f"{runtime.folder}:{DEBIAN}"
    runtime.conf["delegate"] = {"type": "leaky", "isGateway": True}
    return plugin


def bridge_ports(host: Host) -> list[str]:
    return [link["ifname"] for link in host.bridge("link", "show")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("families", FILES)
def test_a_container_comes_and_goes(alpha: Host, families: str, version: str) -> None:
    runtime = prepared(alpha, families, version)
    container = runtime.container()
    assert container.add() == EXPECTED[families]
    assert container.results["eth0"]["cniVersion"] == version
    shown = container.ip("address", "show", "dev", "eth0")[0]
    held = {f"{info['local']}/{info['prefixlen']}" for info in shown["addr_info"]}
    assert set(EXPECTED[families]) <= held
    assert shown["mtu"] == 1450
    assert container.check().result == {}
    container.ip("address", "flush", "dev", "eth0", "scope", "global")
    assert container.check().error["code"] != 0, "CHECK is not passed on"
    if version == "1.1.0":
        assert runtime.status().result == {}
        assert runtime.gc(container).result == {}
        assert runtime.states == [container.name]
    assert container.delete().result == {}
    assert (runtime.states, runtime.allocated, bridge_ports(alpha)) == ([], {}, [])
    assert container.delete().result == {}


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_old_versions_have_results_of_their_own(alpha: Host, version: str) -> None:
    container = prepared(alpha, "ipv4", version).container()
    result = finished(container.start_add()).result
    found = [result["ip4"]["ip"]] if version < "0.3" else addresses(result)
    assert found == EXPECTED["ipv4"]
    assert container.check().error["code"] == 1
    assert container.delete().result == {}


def test_t47_state_of_an_ipv4_container(alpha: Host) -> None:
    runtime = prepared(alpha)
    del runtime.conf["cniVersion"]
    runtime.conf["delegate"] = {"bridge": "cni0"}
    container = runtime.container("some-container-id-ipv4")
    result = finished(container.start_add()).result
    assert result["ip4"]["ip"] == "10.1.17.2/24", "one address, in the form of 0.1.0"
    state = json.loads((runtime.data_dir / container.name).read_text())
    assert state == {
        "name": "cbr0",
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "mtu": 1450,
        "ipam": {
            "type": "host-local",
            "dataDir": str(runtime.ipam_dir),  # the machine's own is not for tests
            "ranges": [[{"subnet": "10.1.17.0/24"}]],
            "routes": [{"dst": "10.1.0.0/16"}],
        },
    }
    assert container.delete().result == {}
    assert runtime.states == []
    assert container.delete().result == {}


def test_t49_state_of_a_dual_stack_container(alpha: Host) -> None:
    runtime = prepared(alpha, "dual-stack")
    container = runtime.container()
    assert container.add() == ["10.1.17.2/24", "fc00::2/64"]
    ipam = json.loads((runtime.data_dir / container.name).read_text())["ipam"]
    assert ipam["ranges"] == [[{"subnet": "10.1.17.0/24"}], [{"subnet": "fc00::/64"}]]
    assert ipam["routes"] == [{"dst": "10.1.0.0/16"}, {"dst": "fc00::/48"}]


def test_s16_two_interfaces_of_one_container(alpha: Host) -> None:
    runtime = prepared(alpha)
    container = runtime.container()
    assert container.add("eth0") == ["10.1.17.2/24"]
    assert container.add("net1") == ["10.1.17.3/24"]
    assert runtime.states == ["c1", "c1@net1"]
    assert container.check("eth0").result == container.check("net1").result == {}
    for _ in range(2):
        assert container.delete("net1").result == {}
    assert runtime.states == ["c1"]
    assert runtime.allocated == {"10.1.17.2": ("c1", "eth0")}
    assert container.check("eth0").result == {}
    assert container.delete("eth0").result == {}
    assert (runtime.states, runtime.allocated) == ([], {})


def test_a_failed_add_leaks_no_address(alpha: Host) -> None:
    runtime = prepared(alpha)
    plugin = leaky(runtime)
    container = runtime.container()
    failing = plugin.with_name("leaky.fails-ADD")
    failing.touch()
    assert container.refused_add() == {"code": 111, "msg": "made to fail", "details": ""}
    assert (runtime.states, runtime.allocated) == ([], {})
    failing.unlink()
    assert container.add() == ["10.1.17.3/24"], "host-local does not give the same again at once"


def test_a_failed_add_beside_another_interface_leaves_that_one(alpha: Host) -> None:
    runtime = prepared(alpha)
    container = runtime.container()
    container.add()
    container.ip("link", "add", "net1", "type", "veth", "peer", "name", "net1p")
    assert "net1" in container.refused_add("net1")["msg"]
    assert runtime.allocated == {"10.1.17.2": ("c1", "eth0")}
    assert container.check().result == {}


def test_s15_del_is_repeated_until_the_delegate_succeeds(alpha: Host) -> None:
    runtime = prepared(alpha)
    plugin = leaky(runtime)
    container = runtime.container()
    container.add()
    failing = plugin.with_name("leaky.fails-DEL")
    failing.touch()
    assert container.delete().error["msg"] == "made to fail"
    assert (runtime.states, len(runtime.allocated)) == (["c1"], 1)
    failing.unlink()
    assert container.delete().result == {}
    assert (runtime.states, runtime.allocated) == ([], {})


def test_containers_attached_by_flannels_plugin_are_detached(alpha: Host) -> None:
    """Its state is one file a container, without ours in it."""
    runtime = prepared(alpha)
    container = runtime.container()
    container.add()
    state = runtime.data_dir / container.name
    text = state.read_text()
    state.unlink()
    state.write_text(text)
    assert container.check().result == {}
    assert container.delete().result == {}
    assert (runtime.states, runtime.allocated) == ([], {})


def test_gc_frees_what_no_container_has_any_more(alpha: Host) -> None:
    runtime = prepared(alpha, version="1.1.0")
    kept, gone = runtime.container("kept"), runtime.container("gone")
    for container in (kept, gone):
        container.add()
    gone.close()
    assert runtime.gc(kept).result == {}
    assert runtime.states == ["kept"]
    assert list(runtime.allocated.values()) == [("kept", "eth0")]
    assert kept.check().result == {}


def test_many_at_once(alpha: Host) -> None:
    runtime = prepared(alpha, "dual-stack")
    containers = [runtime.container(f"c{number}") for number in range(6)]
    results = [finished(child).result for child in [container.start_add() for container in containers]]
    given = [address for result in results for address in addresses(result)]
    assert len(set(given)) == 12
    assert runtime.states == sorted(container.name for container in containers)
    children = [runtime.start("DEL", container.env("eth0")) for container in containers]
    assert [finished(child).result for child in children] == [{}] * 6
    assert (runtime.states, runtime.allocated, bridge_ports(alpha)) == ([], {}, [])


def test_two_interfaces_at_once(alpha: Host) -> None:
    """None takes the other's file."""
    runtime = prepared(alpha)
    container = runtime.container()
    children = [container.start_add(ifname) for ifname in ("eth0", "net1")]
    assert all(finished(child).result["ips"] for child in children)
    assert len(runtime.states) == 2
    for ifname in ("eth0", "net1"):
        assert container.delete(ifname).result == {}
    assert (runtime.states, runtime.allocated) == ([], {})


def delegates(host: Host) -> list[int]:
    """Pids of the plugins that run for a host."""
    found = marked(host.workspace.directory)
    return [pid for pid in found if any(part.startswith(DEBIAN) for part in command_line(pid))]


def test_killed_in_the_middle(alpha: Host) -> None:
    """Wherever ADD is killed, DEL takes all of it away."""
    runtime = prepared(alpha)
    for number in range(15):
        container = runtime.container(f"c{number}")
        child = container.start_add()
        time.sleep(number * 0.004)  # the moment is the point
        child.send_signal(signal.SIGKILL)
        child.communicate()
        wait_for(lambda: delegates(alpha), 10, "the delegate to end", lambda pids: not pids)
        assert container.delete().result == {}
        assert (runtime.states, runtime.allocated, bridge_ports(alpha)) == ([], {}, []), number
        container.close()
