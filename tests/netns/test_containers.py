"""Real containers on two hosts: podman, cni/flannel, Debian's plugins, and the daemon."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.podman import IMAGE, PAGE, Machine, pack_image
from tests.netns.scenes import BACKENDS, config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanneld_py.lab import Lab

FOREVER = ("/bin/sleep", "3600")
WEB = ("/bin/httpd", "-f", "-h", "/www")
REGISTRY_CONF = """
version: 0.1
storage: {filesystem: {rootdirectory: /data}}
http: {addr: ":5000"}
"""


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_image(tmp_path_factory.mktemp("image") / "lab.tar", commands=["dnsmasq"])


@pytest.fixture(scope="session")
def registry_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {"etc/registry.yml": REGISTRY_CONF}
    path = tmp_path_factory.mktemp("registry") / "registry.tar"
    return pack_image(path, commands=["docker-registry"], files=files)


@pytest.fixture(params=BACKENDS)
def machines(lab: Lab, image: Path, request: pytest.FixtureRequest) -> Iterator[list[Machine]]:
    """Two, in one overlay, with the image."""
    lab.etcd.put_config(config(request.param))
    hosts = lab.add_hosts("alpha", "beta")
    for daemon in [host.start_daemon() for host in hosts]:
        daemon.wait_ready()
    with ExitStack() as stack:
        both = [stack.enter_context(Machine(host, ipMasq=False)) for host in hosts]
        for machine in both:
            machine.podman("import", str(image), IMAGE)
        yield both


def test_containers_use_one_another(machines: list[Machine]) -> None:
    """Ping, a page, a name, and a published port, each on the other host."""
    alpha, beta = machines
    web = beta.launch("web", *WEB, options=["--publish=8080:80"])
    names = beta.launch(
        "names", "/bin/dnsmasq", "--keep-in-foreground", "--user=root", "--no-resolv", "--no-hosts",
        "--pid-file=", "--local=/web.example/",
        f"--address=/web.example/{web}",
    )  # fmt: skip
    client = alpha.launch("client", *FOREVER, options=[f"--dns={names}"])
    assert alpha.inside("client", "ping", "-c", "2", "-W", "2", web).count("bytes from") == 2
    assert beta.inside("web", "ping", "-c", "2", "-W", "2", client).count("bytes from") == 2
    assert alpha.inside("client", "wget", "-qO-", f"http://{web}/") == PAGE.strip()
    assert web in alpha.inside("client", "nslookup", "web.example", names)
    assert alpha.inside("client", "wget", "-qO-", "http://web.example/") == PAGE.strip()
    assert alpha.run(["busybox", "wget", "-qO-", f"http://{beta.host.address}:8080/"]) == PAGE


def test_an_image_goes_through_a_registry(machines: list[Machine], registry_image: Path) -> None:
    alpha, beta = machines
    beta.podman("import", str(registry_image), "localhost/registry:1")
    serve = ("/bin/docker-registry", "serve", "/etc/registry.yml")
    address = beta.launch("registry", *serve, image="localhost/registry:1")
    pushed = f"{address}:5000/lab:1"
    wait_for(lambda: "5000" in beta.inside("registry", "netstat", "-ltn"), 10, "the registry to listen")
    alpha.podman("push", "--tls-verify=false", IMAGE, pushed)
    before = alpha.podman("image", "inspect", "--format", "{{.Id}}", IMAGE)
    alpha.podman("rmi", IMAGE)
    alpha.podman("pull", "--tls-verify=false", pushed)
    assert alpha.podman("image", "inspect", "--format", "{{.Id}}", pushed) == before
    alpha.launch("again", *FOREVER, image=pushed)


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_a_download_outlasts_the_daemons(machines: list[Machine], end: str) -> None:
    alpha, beta = machines
    web = beta.launch("web", *WEB)
    alpha.launch("client", *FOREVER)
    fetch = f"wget -qO /data/got http://{web}/cgi-bin/download"
    download = alpha.start(["podman", "exec", "client", "/bin/sh", "-c", fetch])

    def lines() -> int:
        return int(alpha.inside("client", "/bin/sh", "-c", "wc -l 2>/dev/null </data/got || echo 0"))

    wait_for(lines, 10, "the download to begin", lambda count: count > 10)
    for machine in machines:
        getattr(machine.host.daemon, end)()
    for daemon in [machine.host.start_daemon() for machine in machines]:
        daemon.wait_ready()
    so_far = lines()
    wait_for(lines, 5, "the download to go on", lambda count: count > so_far + 50)
    beta.inside("web", "touch", "/data/stop")
    _, complaint = download.communicate(timeout=10)
    assert (download.returncode, complaint) == (0, "")
    got = alpha.inside("client", "cat", "/data/got").split()
    assert [int(line) for line in got[:-1]] == [*range(1, len(got))]
    assert got[-1] == "end"


def test_removing_a_container_frees_its_address(machines: list[Machine]) -> None:
    alpha = machines[0]
    addresses = sorted(alpha.launch(name, *FOREVER) for name in ("one", "two"))
    assert alpha.allocated == addresses
    assert len(alpha.states) == 2
    alpha.podman("rm", "--force", "--time=0", "one")
    assert len(alpha.allocated) == len(alpha.states) == 1
    alpha.podman("rm", "--force", "--time=0", "two")
    assert (alpha.allocated, alpha.states) == ([], [])
