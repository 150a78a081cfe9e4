"""cni/flannel with several calls at once, a kill, and a dataDir that is not as it should be; real plugins."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.cni import DEBIAN, FLANNEL, finished
from tests.netns.test_cni_verbs import bridge_ports, prepared

if TYPE_CHECKING:
    from pathlib import Path

    from flanneld_py.lab import Host, Lab
    from tests.netns.cni import Runtime

# A bridge that does not begin before it is let: a slow host.
SLOW = f"""#!/bin/sh
if [ "$CNI_COMMAND" = ADD ]; then
    : >"$0.begun"
    until [ -e "$0.go" ]; do sleep 0.02; done
fi
exec {DEBIAN}/bridge
"""


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.add_host("alpha")


def slow(runtime: Runtime) -> Path:
    """Make the delegate SLOW; its file."""
    runtime.folder.mkdir()
    plugin = runtime.folder / "slow"
    plugin.write_text(SLOW)
    plugin.chmod(0o755)
    runtime.path = f"{runtime.folder}:{DEBIAN}"
    runtime.conf["delegate"] = {"type": "slow", "isGateway": True}
    return plugin


def test_dels_at_once(alpha: Host) -> None:
    runtime = prepared(alpha)
    for number in range(4):
        container = runtime.container(f"c{number}")
        container.add()
        children = [runtime.start("DEL", container.env("eth0")) for _ in range(4)]
        assert [finished(child).result for child in children] == [{}] * 4
    assert (runtime.states, runtime.allocated, bridge_ports(alpha)) == ([], {}, [])


def test_gc_beside_dels(alpha: Host) -> None:
    runtime = prepared(alpha, version="1.1.0")
    containers = [runtime.container(f"c{number}") for number in range(4)]
    for container in containers:
        container.add()
    conf = runtime.conf | {"cni.dev/valid-attachments": []}
    children = [runtime.start("GC", {}, conf)]
    children += [runtime.start("DEL", container.env("eth0")) for container in containers]
    assert [finished(child).result for child in children] == [{}] * 5
    assert (runtime.states, runtime.allocated) == ([], {})


def test_a_delegate_that_outlives_its_add_leaks_nothing(alpha: Host) -> None:
    runtime = prepared(alpha)
    plugin = slow(runtime)
    container = runtime.container()
    add = container.start_add()
    wait_for(plugin.with_name("slow.begun").exists, 10, "the delegate to begin")
    add.send_signal(signal.SIGKILL)
    add.communicate()
    delete = runtime.start("DEL", container.env("eth0"))
    with pytest.raises(subprocess.TimeoutExpired):
        delete.wait(0.3)
    plugin.with_name("slow.go").touch()
    assert finished(delete).result == {}
    assert (runtime.states, runtime.allocated, bridge_ports(alpha)) == ([], {}, [])


def test_a_damaged_file_does_not_keep_the_container_attached(alpha: Host) -> None:
    runtime = prepared(alpha, "dual-stack")
    container = runtime.container()
    container.add()
    (runtime.data_dir / container.name).write_text("")
    answer = container.delete()
    assert (answer.exit_code, "c1 is damaged" in answer.stderr) == (0, True)
    assert (runtime.states, runtime.allocated, bridge_ports(alpha)) == ([], {}, [])


def test_status_is_50_where_data_dir_is_read_only(alpha: Host) -> None:
    runtime = prepared(alpha, version="1.1.0")
    runtime.data_dir.mkdir(parents=True)
    assert runtime.status().result == {}
    script = runtime.folder / "read-only"
    mount = f"mount --bind {runtime.data_dir} {runtime.data_dir}"
    script.write_text(f"{mount} && mount -o remount,ro,bind {runtime.data_dir} && exec {FLANNEL}")
    plugin = ["unshare", "-m", "sh", str(script)]
    error = finished(runtime.start("STATUS", {}, plugin=plugin)).error
    assert (error["code"], "read-only" in error["msg"]) == (50, True)
    container = runtime.container()
    assert finished(runtime.start("ADD", container.env("eth0"), plugin=plugin)).error["code"] == 999
    assert runtime.allocated == {}
