"""Docker's options on a real host: from what the daemon wrote, and when the subnet is another host's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import CommandFailed
from tests.netns.scenes import config
from tests.unit.test_docker_opts import COMBINED, ENV, PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.lab import Host, Lab


def write(host: Host, program: Sequence[str], *args: str) -> str:
    """The output file, also when the program fails; CommandFailed has the rest."""
    output = host.directory / "docker_opts.env"
    host.run(
        [*program, "-f", str(host.subnet_file), "-d", str(output), *args],
        env={"FLANNELD_ENV_FILE": os.devnull},
    )
    return output.read_text()


def test_from_what_the_daemon_wrote(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    host = lab.add_host("alpha")
    host.start_daemon().wait_ready()
    bip = host.subnet_env()["FLANNEL_SUBNET"]
    for program in PROGRAMS.values():
        assert write(host, program, "-c") == f'DOCKER_OPTS=" --bip={bip} --ip-masq=true --mtu=1450"\n'


@pytest.mark.parametrize(
    ("subnet", "route"),
    [
        ("10.1.74.1/24", "10.1.74.0/24"),
        ("10.1.77.1/22", "10.1.76.0/22"),
        ("10.1.74.129/25", "10.1.74.128/25"),
        ("10.1.74.7/32", "10.1.74.7/32"),
    ],
)
def test_the_subnet_of_another_host(lab: Lab, subnet: str, route: str) -> None:
    host = lab.add_host("alpha")
    host.subnet_file.write_text(ENV.replace("10.1.74.1/24", subnet))
    written = COMBINED.replace("10.1.74.1/24", subnet)
    others = ("10.1.74.0/23", "110.1.74.0/24", "10.1.7.0/24")
    host.ip_batch([f"route add {other} via 192.0.2.254" for other in others])
    host.ip_batch([f"route add {route} dev eth0"])
    for program in PROGRAMS.values():
        assert write(host, program, "-c") == written

    host.ip_batch([f"route replace {route} via 192.0.2.77 dev eth0 proto static metric 0"])
    for program in PROGRAMS.values():
        (host.directory / "docker_opts.env").unlink()
        with pytest.raises(CommandFailed) as failure:
            write(host, program, "-c")
        told = (
            f"FLANNEL_SUBNET={subnet}: this host has a route to that subnet via 192.0.2.77 dev eth0, so it "
        )
        assert told in failure.value.stderr
        assert failure.value.stderr.count("\n") == 1
        assert (host.directory / "docker_opts.env").read_text() == written, "as flannel: written nevertheless"
