"""What cni/flannel, as it is installed, costs: ADD by it against ADD by the bridge plugin that it calls.

As a program it is the container runtime: it starts the plugins as one would, in the namespace of a host.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flanneld_py.lab.netns import Namespace
from flanneld_py.lab.topology import Lab

PLUGINS = Path("/usr/lib/cni")
"""Of Debian's containernetworking-plugins."""
BRIDGE = PLUGINS / "bridge"
_COMPILE = Path(__file__).parents[2] / ".ci" / "compile-plugin"
_PYTHON = "/usr/bin/python3"
_IPV4 = ("10.5.0.0/16", "10.5.250.0/24")
_IPV6 = ("fd05::/48", "fd05:0:0:250::/64")
_FAMILIES = {"IPv4": {"": _IPV4}, "dual-stack": {"": _IPV4, "IPV6_": _IPV6}}
"""Name → infix of the keys in subnet.env → Network and subnet."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one ADD, in milliseconds: until it ended, and of processor, its children's included."""

    wall: float
    cpu: float


def add_overhead(lab: Lab, pairs: int = 30) -> list[str]:
    """A line of medians for each of _FAMILIES, with the ratio of flannel's to the bridge's of the same pair.

    The two take turns on one container, so that noise of the machine meets both.
    """
    installed = lab.workspace.run([_PYTHON, "-IS", str(_COMPILE), _PYTHON])
    lines = []
    for families in _FAMILIES:
        host, container = Namespace(lab.workspace, "cni"), Namespace(lab.workspace, "cni-pod")
        confs = _confs(lab.workspace.directory / f"cni-{families}", families, installed)
        work = {"netns": container.path, "confs": confs, "pairs": pairs}
        said = host.run(
            [sys.executable, "-m", "flanneld_py.lab.cnibench"], text=json.dumps(work), timeout=10 + pairs
        )
        host.close()
        container.close()
        lines.append(_line(families, [[Cost(*cost) for cost in pair] for pair in json.loads(said)]))
    return lines


def _line(families: str, taken: list[list[Cost]]) -> str:
    bridge, flannel = (median(cost.wall for cost in costs) for costs in zip(*taken, strict=True))
    more = median(ours.wall - theirs.wall for theirs, ours in taken)
    cpu = median(ours.cpu - theirs.cpu for theirs, ours in taken)
    ratio = median(ours.wall / theirs.wall for theirs, ours in taken)
    return (
        f"CNI ADD, {families}: {bridge:.1f} ms by bridge alone, {flannel:.1f} ms by flannel, which calls it; "
        f"in the same pair {more:.1f} ms more ({cpu:.1f} ms of processor), ratio {ratio:.2f} "
        f"(each the median of {len(taken)} pairs)"
    )


def _confs(folder: Path, families: str, installed: str) -> dict[str, dict[str, Any]]:
    """Plugin → its network config; they come to the same bridge and the same addresses."""
    folder.mkdir()
    nets = _FAMILIES[families]
    env = [f"FLANNEL_{key}NETWORK={network}" for key, (network, _) in nets.items()]
    env += [f"FLANNEL_{key}SUBNET={subnet}" for key, (_, subnet) in nets.items()]
    (folder / "subnet.env").write_text("\n".join([*env, "FLANNEL_MTU=1450", "FLANNEL_IPMASQ=true", ""]))
    common = {"cniVersion": "1.0.0", "name": "bench"}
    ipam: dict[str, Any] = {"type": "host-local", "dataDir": str(folder / "networks")}
    files = {"subnetFile": str(folder / "subnet.env"), "dataDir": str(folder / "flannel")}
    ranges = [[{"subnet": subnet}] for _, subnet in nets.values()]
    routes = [{"dst": network} for network, _ in nets.values()]
    whole = {
        "type": "bridge",
        "isGateway": True,
        "mtu": 1450,
        "ipam": ipam | {"ranges": ranges, "routes": routes},
    }
    plugin = folder / "flannel-as-installed"
    plugin.write_text(installed)
    plugin.chmod(0o755)
    return {str(BRIDGE): common | whole, str(plugin): common | {"type": "flannel", "ipam": ipam} | files}


def _attach_in_turns(netns: str, confs: Mapping[str, Any], pairs: int) -> list[list[tuple[float, float]]]:
    """Wall and processor milliseconds of each ADD, plugin by plugin; the first pair makes the bridge."""
    env = {"CNI_CONTAINERID": "bench", "CNI_IFNAME": "eth0", "CNI_NETNS": netns, "CNI_PATH": str(PLUGINS)}
    taken = []
    for _ in range(pairs + 1):
        pair = []
        for plugin, conf in confs.items():
            pair.append(_cost(plugin, env | {"CNI_COMMAND": "ADD"}, conf))
            _cost(plugin, env | {"CNI_COMMAND": "DEL"}, conf)
        taken.append(pair)
    return taken[1:]


def _cost(plugin: str, env: Mapping[str, str], conf: Mapping[str, Any]) -> tuple[float, float]:
    stdin, stdout = (os.memfd_create(name) for name in ("stdin", "stdout"))
    os.write(stdin, json.dumps(conf).encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    redirected = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin, stdout))]
    begun = time.monotonic()
    pid = os.posix_spawn(plugin, [plugin], env, file_actions=redirected)
    _, status, used = os.wait4(pid, 0)
    seconds = time.monotonic() - begun
    said = os.pread(stdout, 1 << 16, 0)
    for fd in (stdin, stdout):
        os.close(fd)
    if status:
        sys.exit(f"{plugin} {env['CNI_COMMAND']}: {said.decode(errors='replace')}")
    return seconds * 1000, (used.ru_utime + used.ru_stime) * 1000


if __name__ == "__main__":
    print(json.dumps(_attach_in_turns(**json.load(sys.stdin))))
