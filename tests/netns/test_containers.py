"""Real containers on two hosts: podman, cni/flannel, Debian's plugins, and the daemon."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.packet_filters import filter_config, variant
from tests.netns.podman import HTTPD, IMAGE, PAGE, WEB, Machine, pack_image
from tests.netns.scenes import BACKENDS, IN_KERNEL, MTU

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from flanneld_py.lab import Host, Lab

MASQUERADE = ("--ip-masq",)
FOREVER = ("/bin/sleep", "3600")
SERVE = (*HTTPD, "/www")
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


@contextmanager
def overlay(
    lab: Lab,
    image: Path,
    backend: str,
    tool: str = "iptables-nft",
    args: Sequence[str] = MASQUERADE,
    **delegate: bool,
) -> Iterator[list[Machine]]:
    """Two machines with daemons that write rules by this tool, and the image."""
    lab.etcd.put_config(filter_config(backend, tool))
    hosts = lab.add_hosts("alpha", "beta")
    for host in hosts if backend == "udp" else ():
        host.keep_descriptors()
    for daemon in [host.start_daemon(args, env=variant(host, tool)) for host in hosts]:
        daemon.wait_ready()
    with ExitStack() as stack:
        machines = [stack.enter_context(Machine(host, **delegate)) for host in hosts]
        for machine in machines:
            machine.podman("import", str(image), IMAGE)
        yield machines


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def machines(lab: Lab, image: Path, backend: str) -> Iterator[list[Machine]]:
    with overlay(lab, image, backend) as both:
        yield both


def start_world(lab: Lab) -> Host:
    """A web server that is on no overlay."""
    world = lab.add_host("world")
    folder = world.directory / "www"
    for name, text in WEB.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    world.spawn("httpd", ["busybox", *HTTPD, str(folder)])
    wait_for(lambda: ":80 " in world.run(["busybox", "netstat", "-ltn"]), 5, "the web server to listen")
    return world


def seen(machine: Machine, name: str, server: str) -> str:
    """The address that a web server is asked from by a container."""
    return machine.fetch(name, f"http://{server}/cgi-bin/who")


def test_containers_use_one_another(machines: list[Machine], backend: str) -> None:
    alpha, beta = machines
    web = beta.launch("web", *SERVE, port=80)
    names = beta.launch(
        "names", "/bin/dnsmasq", "--keep-in-foreground", "--user=root", "--no-resolv", "--no-hosts",
        "--pid-file=", "--local=/web.example/", f"--address=/web.example/{web}", port=53,
    )  # fmt: skip
    client = alpha.launch("client", *FOREVER, options=[f"--dns={names}"])
    mtu = MTU[backend, "ipv4"]
    assert f"mtu {mtu} " in alpha.inside("client", "ip", "link", "show", "eth0"), "MTU"
    full = f"{mtu - 28}"  # an IPv4 and an ICMP header are 28 bytes
    there = alpha.inside("client", "ping", "-c", "2", "-W", "2", "-s", full, web)
    assert there.count("bytes from") == 2, "ping"
    back = beta.inside("web", "ping", "-c", "2", "-W", "2", "-s", full, client)
    assert back.count("bytes from") == 2, "ping, from the other side"
    assert alpha.fetch("client", f"http://{web}/") == PAGE.strip(), "a page"
    assert web in alpha.inside("client", "nslookup", "web.example", names), "a name, from the server named"
    assert alpha.fetch("client", "http://web.example/") == PAGE.strip(), "a page by name, from --dns"


def test_an_image_goes_through_a_registry(machines: list[Machine], registry_image: Path) -> None:
    alpha, beta = machines
    beta.podman("import", str(registry_image), "localhost/registry:1")
    serve = ("/bin/docker-registry", "serve", "/etc/registry.yml")
    address = beta.launch("registry", *serve, image="localhost/registry:1", port=5000)
    pushed = f"{address}:5000/lab:1"
    alpha.podman("push", "--tls-verify=false", IMAGE, pushed)
    before = alpha.podman("image", "inspect", "--format", "{{.Id}}", IMAGE)
    alpha.podman("rmi", IMAGE)
    assert alpha.podman("images", "--quiet") == ""
    alpha.podman("pull", "--tls-verify=false", pushed)
    assert alpha.podman("image", "inspect", "--format", "{{.Id}}", pushed) == before
    alpha.launch("again", *FOREVER, image=pushed)


@pytest.mark.parametrize("tool", ["nft", "iptables-nft"])
def test_containers_are_masqueraded_outside_and_not_inside(
    lab: Lab, image: Path, backend: str, tool: str
) -> None:
    world = start_world(lab)
    with overlay(lab, image, backend, tool) as (alpha, beta):
        one, two = (machine.launch("web", *SERVE, port=80) for machine in (alpha, beta))
        second = alpha.launch("second", *FOREVER)
        for machine, own, other in ((alpha, one, two), (beta, two, one)):
            assert seen(machine, "web", world.address) == machine.host.address, "outside"
            assert seen(machine, "web", other) == own, "a container of the other host"
        assert seen(alpha, "second", one) == second, "a container of the same host"


def test_nothing_is_masqueraded_when_nobody_is_to(lab: Lab, image: Path) -> None:
    world = start_world(lab)
    with overlay(lab, image, "vxlan", args=(), ipMasq=False) as (alpha, beta):
        one, two = (machine.launch("web", *SERVE, port=80) for machine in (alpha, beta))
        for machine, own, other in ((alpha, one, two), (beta, two, one)):
            world.run(["ip", "route", "add", own, "via", machine.host.address])
            assert seen(machine, "web", world.address) == own, "outside"
            assert seen(machine, "web", other) == own, "a container of the other host"


def test_the_bridge_masquerades_when_the_daemon_does_not(lab: Lab, image: Path) -> None:
    """As with flannel: the plugin's default for ipMasq is the opposite of FLANNEL_IPMASQ."""
    world = start_world(lab)
    with overlay(lab, image, "vxlan", args=()) as (alpha, beta):
        web = beta.launch("web", *SERVE, port=80)
        alpha.launch("client", *FOREVER)
        assert seen(alpha, "client", world.address) == alpha.host.address, "outside"
        assert alpha.fetch("client", f"http://{web}/") == PAGE.strip(), "a container of the other host"


def test_a_published_port(lab: Lab, image: Path, backend: str) -> None:
    world = start_world(lab)
    with overlay(lab, image, backend) as (alpha, beta):
        beta.launch("web", *SERVE, options=["--publish=8080:80"], port=80)
        for machine in (alpha, beta):
            machine.launch("client", *FOREVER)
        published = f"{beta.host.address}:8080"
        who = f"http://{published}/cgi-bin/who"
        assert world.run(["busybox", "wget", "-qO-", who]).strip() == world.address, "from outside"
        assert alpha.run(["busybox", "wget", "-qO-", who]).strip() == alpha.host.address, "the other host"
        assert seen(alpha, "client", published) == alpha.host.address, "a container of the other host"
        for name in ("client", "web"):
            assert beta.fetch(name, f"http://{published}/") == PAGE.strip(), f"{name} on the same host"
        beta.podman("rm", "--force", "--time=0", "web")
        assert "8080" not in beta.run(["iptables-save"]), "withdrawn with the container"


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_a_download_outlasts_the_daemons(machines: list[Machine], backend: str, end: str) -> None:
    """With udp it waits, in descriptors that the service manager keeps, and then goes on without a loss."""
    alpha, beta = machines
    web = beta.launch("web", *SERVE, port=80)
    alpha.launch("client", *FOREVER)
    fetch = f"wget -qO /data/got http://{web}/cgi-bin/download"
    download = alpha.start(["podman", "exec", "client", "/bin/sh", "-c", fetch])
    alpha.podman("exec", "--detach", "client", "/bin/sh", "-c", f"ping -i 0.02 {web} >/data/pings")

    def lines() -> int:
        return int(alpha.inside("client", "/bin/sh", "-c", "wc -l 2>/dev/null </data/got || echo 0"))

    def wait_lines(what: str) -> None:
        so_far = lines()
        wait_for(lines, 5, f"the download to {what}", lambda count: count >= so_far + 30)

    wait_lines("begin")
    for machine in machines:
        getattr(machine.host.daemon, end)()
    if backend in IN_KERNEL:
        wait_lines("go on without daemons")
    for daemon in [machine.host.start_daemon(MASQUERADE) for machine in machines]:
        daemon.wait_ready()
    wait_lines("go on with new daemons")
    beta.inside("web", "touch", "/data/stop")
    _, complaint = download.communicate(timeout=10)
    assert (download.returncode, complaint) == (0, "")
    got = alpha.inside("client", "cat", "/data/got").split()
    assert [int(line) for line in got[:-1]] == [*range(1, len(got))]
    assert got[-1] == "end"
    answered = alpha.answered("client", "/data/pings")
    assert answered == [*range(len(answered))], "a ping beside it, which nobody sends again"
    assert len(answered) > 50


def test_removing_a_container_frees_its_address(machines: list[Machine]) -> None:
    for machine in machines:
        addresses = sorted(machine.launch(name, *FOREVER) for name in ("one", "two"))
        assert machine.allocated == addresses
        assert len(machine.states) == 2
        machine.podman("rm", "--force", "--time=0", "one")
        assert machine.allocated == [machine.address("two")]
        assert len(machine.states) == 1
        machine.podman("rm", "--force", "--time=0", "two")
        assert (machine.allocated, machine.states) == ([], [])
