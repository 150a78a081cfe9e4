"""What cni/flannel costs: ADD by it against ADD by the bridge plugin that it calls."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.topology import Lab

PLUGINS = Path("/usr/lib/cni")
"""Of Debian's containernetworking-plugins."""
BRIDGE = PLUGINS / "bridge"
_FLANNEL = Path(__file__).parents[2] / "cni" / "flannel"
_SUBNET, _NETWORK = "10.5.250.0/24", "10.5.0.0/16"
_LEASE = f"FLANNEL_NETWORK={_NETWORK}\nFLANNEL_SUBNET=10.5.250.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"


def add_overhead(lab: Lab, pairs: int = 30) -> str:
    """A line of medians; the two take turns on one container, so that noise of the machine meets both."""
    host, container = Namespace(lab.workspace, "cni"), Namespace(lab.workspace, "cni-pod")
    folder = lab.workspace.directory / "cni"
    folder.mkdir()
    (folder / "subnet.env").write_text(_LEASE)
    ipam: dict[str, Any] = {"type": "host-local", "dataDir": str(folder / "networks")}
    common = {"cniVersion": "1.0.0", "name": "bench"}
    files = {"subnetFile": str(folder / "subnet.env"), "dataDir": str(folder / "flannel")}
    by_flannel = {**common, "type": "flannel", **files, "ipam": ipam}
    range_and_route = {"ranges": [[{"subnet": _SUBNET}]], "routes": [{"dst": _NETWORK}]}
    alone = {**common, "type": "bridge", "isGateway": True, "mtu": 1450, "ipam": ipam | range_and_route}
    taken: dict[Path, list[float]] = {BRIDGE: [], _FLANNEL: []}
    for number in range(pairs + 1):
        for plugin, conf in ((BRIDGE, alone), (_FLANNEL, by_flannel)):
            seconds = _add(host, container, plugin, conf)
            if number:  # the first time the bridge itself is made
                taken[plugin].append(seconds * 1000)
    host.close()
    container.close()
    overhead = median(ours - theirs for theirs, ours in zip(*taken.values(), strict=True))
    middle = {plugin.name: median(values) for plugin, values in taken.items()}
    return (
        f"CNI ADD: {middle['bridge']:.1f} ms by bridge alone, {middle['flannel']:.1f} ms by flannel, which "
        f"calls it: {overhead:.1f} ms more (medians of {pairs} pairs)"
    )


def _add(host: Namespace, container: Namespace, plugin: Path, conf: Mapping[str, Any]) -> float:
    """The seconds of an ADD, which is then undone."""
    env = {"CNI_CONTAINERID": "bench", "CNI_IFNAME": "eth0", "CNI_NETNS": container.path}
    env |= {"CNI_PATH": str(PLUGINS)}
    begun = time.monotonic()
    host.run([os.fspath(plugin)], env=env | {"CNI_COMMAND": "ADD"}, text=json.dumps(conf))
    seconds = time.monotonic() - begun
    host.run([os.fspath(plugin)], env=env | {"CNI_COMMAND": "DEL"}, text=json.dumps(conf))
    return seconds
