"""etcd with TLS: who is trusted, who is let in, and certificates that are replaced while all goes on."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest

from flanneld_py.drivers import etcdwatch
from flanneld_py.errors import Refused, Unreachable, UsageError
from flanneld_py.lab import CommandFailed, wait_for
from tests.netns.etcd_servers import Authority, Etcd, free_ports, wait_until
from tests.netns.observing import codes, events, start_pings, wait_answers, wait_problem, wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.registry_clients import following, seen, watching
from tests.netns.scenes import config
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flanneld_py.drivers.etcd import EtcdRegistry
    from flanneld_py.lab import Daemon, Host, Lab

EX_CONFIG = 78
IN_THE_LAB = "IP:127.0.0.1,IP:192.0.2.254,IP:2001:db8::fe"
NOTICED_WITHIN = 3 * etcdwatch.LOOK_SECONDS


# --- the driver -----------------------------------------------------------------------------------


def test_tls(tmp_path: Path, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    certificate, key = map(str, ours.issue("server"))
    server = servers("--cert-file", certificate, "--key-file", key, scheme="https").start()
    assert connect(server.url, ca_file=str(ours.ca)).list().entries == ()

    trusted = tmp_path / "trusted.crt"
    trusted.write_bytes(other.ca.read_bytes())
    registry = connect(server.url, ca_file=str(trusted))
    # Without a file the system's CAs are trusted.
    for doubtful, told in (
        (registry, f"--etcd-cafile {trusted}"),
        (connect(server.url), "no --etcd-cafile: "),
    ):
        with pytest.raises(Refused, match=f"etcd {server.url}: TLS verification failed: .* \\({told}"):
            doubtful.list()
    trusted.write_bytes(ours.ca.read_bytes())
    assert registry.list().entries == ()

    with pytest.raises(Unreachable, match="connection closed; if it never worked, try https"):
        connect(server.url.replace("https", "http")).list()
    (dead,) = free_ports(1)
    with pytest.raises(Unreachable, match=r"connection refused; .*TLS verification failed"):
        connect(f"https://127.0.0.1:{dead}", server.url, ca_file=str(other.ca)).list()


def test_etcd_without_tls_is_named(
    shared: Etcd, connect: Callable[..., EtcdRegistry], tmp_path: Path
) -> None:
    ca = Authority(tmp_path / "ours").ca
    with pytest.raises(Unreachable, match=r"no TLS; does it serve http:// only\?"):
        connect(shared.url.replace("http", "https"), ca_file=str(ca)).list()


def test_tls_with_client_certificates(
    tmp_path: Path, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    certificate, key = map(str, ours.issue("server"))
    options = ("--cert-file", certificate, "--key-file", key)
    server = servers(
        *options, "--client-cert-auth", "--trusted-ca-file", str(ours.ca), scheme="https"
    ).start()

    def client(authority: Authority) -> EtcdRegistry:
        cert_file, key_file = map(str, authority.issue("client"))
        return connect(server.url, ca_file=str(ours.ca), cert_file=cert_file, key_file=key_file)

    for stranger in (client(other), connect(server.url, ca_file=str(ours.ca))):
        with pytest.raises(Refused, match="our client certificate, or the lack of one"):
            stranger.list()
    registry = client(ours)
    with watching(registry) as stream:
        server.kill()
        with pytest.raises(Unreachable):
            list(stream)
    server.start()
    assert registry.list().entries == ()


def test_certificate_of_another_host(
    tmp_path: Path, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    ours = Authority(tmp_path / "ours")
    certificate, key = map(str, ours.issue("server", "DNS:etcd.example"))
    server = servers("--cert-file", certificate, "--key-file", key, scheme="https").start()
    with pytest.raises(Refused, match="TLS verification failed: certificate of another host"):
        connect(server.url, ca_file=str(ours.ca)).list()


def test_unusable_tls_files_are_named(tmp_path: Path, connect: Callable[..., EtcdRegistry]) -> None:
    ours = Authority(tmp_path / "ours")
    certificate, key = map(str, ours.issue("client"))
    _, other_key = map(str, ours.issue("other"))
    nonsense = str(tmp_path / "nonsense")
    (tmp_path / "nonsense").write_text("nonsense")
    url, ca = "https://127.0.0.1:2379", str(ours.ca)
    for files, message in (
        ({"ca_file": "/nowhere"}, "--etcd-cafile: '/nowhere': No such file or directory"),
        ({"ca_file": nonsense}, f"--etcd-cafile: '{nonsense}': expected PEM certificates"),
        (
            {"ca_file": ca, "cert_file": certificate},
            f"--etcd-certfile: '{certificate}', --etcd-keyfile: '': expected both or neither",
        ),
        (
            {"ca_file": ca, "cert_file": certificate, "key_file": "/nowhere"},
            "--etcd-keyfile: '/nowhere': No such",
        ),
        (
            {"ca_file": ca, "cert_file": nonsense, "key_file": key},
            f"--etcd-certfile: '{nonsense}': expected a PEM certificate",
        ),
        (
            {"ca_file": ca, "cert_file": certificate, "key_file": nonsense},
            f"--etcd-keyfile: '{nonsense}': expected a PEM private key, unencrypted",
        ),
        (
            {"ca_file": ca, "cert_file": certificate, "key_file": other_key},
            f"--etcd-keyfile: '{other_key}': expected the private key that belongs to --etcd-certfile "
            f"'{certificate}'",
        ),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
            connect(url, **files)


def test_a_watch_moves_to_new_certificates_and_never_to_half_of_them(
    tmp_path: Path,
    servers: Callable[..., Etcd],
    connect: Callable[..., EtcdRegistry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(etcdwatch, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(etcdwatch, "CREATE_SECONDS", 0.1)
    ours = Authority(tmp_path / "ours")
    certificate, key = map(str, ours.issue("server"))
    options = ("--cert-file", certificate, "--key-file", key)
    server = servers(
        *options, "--client-cert-auth", "--trusted-ca-file", str(ours.ca), scheme="https"
    ).start()
    cert_file, key_file = tmp_path / "client.crt", tmp_path / "client.key"
    old, new = ours.issue("old"), ours.issue("new")
    shutil.copy(old[0], cert_file)
    shutil.copy(old[1], key_file)
    files = {"ca_file": str(ours.ca), "cert_file": str(cert_file), "key_file": str(key_file)}
    writer = connect(server.url, **files | dict(zip(("cert_file", "key_file"), map(str, new), strict=True)))
    writer.put("elsewhere", "x")
    others = server.clients()
    registry = connect(server.url, **files)
    with following(registry) as items:
        writer.put("config", "1")
        wait_until(lambda: seen(items) == [("config", b"1")])
        before = server.clients() - others
        assert before
        shutil.copy(new[0], cert_file)
        writer.put("config", "2")
        wait_until(lambda: len(seen(items)) == 2)
        assert registry.get("config") is not None
        assert server.clients() - others == before, "the key is still that of the old certificate"
        shutil.copy(new[1], key_file)
        wait_until(lambda: (now := server.clients() - others) and not now & before)
        writer.put("config", "3")
        wait_until(lambda: seen(items) == [("config", b"1"), ("config", b"2"), ("config", b"3")])


def test_files_that_became_unusable_are_named(
    tmp_path: Path, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    ours = Authority(tmp_path / "ours")
    certificate, key = map(str, ours.issue("server"))
    server = servers("--cert-file", certificate, "--key-file", key, scheme="https").start()
    trusted = tmp_path / "trusted.crt"
    shutil.copy(ours.ca, trusted)
    registry = connect(server.url, ca_file=str(trusted))
    registry.list()
    trusted.write_text("nonsense")
    registry.list()  # by the connection there is
    registry.reconnect()
    with pytest.raises(Refused, match=f"etcd {server.url}: --etcd-cafile: '{trusted}': expected PEM"):
        registry.list()
    shutil.copy(ours.ca, trusted)
    registry.list()


# --- daemons --------------------------------------------------------------------------------------


class Files(NamedTuple):
    """What the daemons of all hosts are given, to be replaced in place."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def flags(self) -> list[str]:
        return [
            f"--etcd-cafile={self.ca}",
            f"--etcd-certfile={self.certificate}",
            f"--etcd-keyfile={self.key}",
        ]

    def put(self, pair: tuple[Path, Path]) -> None:
        shutil.copy(pair[0], self.certificate)
        shutil.copy(pair[1], self.key)


def serve(lab: Lab, authority: Authority, *more: str) -> tuple[str, ...]:
    """Let the lab's etcd speak TLS only; the flags with which a client trusts it."""
    certificate, key = authority.issue("server", IN_THE_LAB)
    lab.etcd.stop()
    lab.etcd.scheme = "https"
    lab.etcd.server_flags = (f"--cert-file={certificate}", f"--key-file={key}", *more)
    lab.etcd.client_flags = (f"--cacert={authority.ca}",)
    lab.etcd.start()
    return (f"--etcd-cafile={authority.ca}",)


def serve_to_clients_of(lab: Lab, authority: Authority, clients: Path, *more: str) -> None:
    """The same for clients with a certificate by one of the CAs in a file."""
    certificate, key = authority.issue("etcdctl")
    only = ("--client-cert-auth", f"--trusted-ca-file={clients}", *more)
    serve(lab, authority, *only)
    lab.etcd.client_flags += (f"--cert={certificate}", f"--key={key}")


def start(lab: Lab, flags: tuple[str, ...] | list[str], *names: str, backend: str = "vxlan") -> list[Host]:
    lab.etcd.put_config(config(backend))
    hosts = lab.add_hosts(*names)
    lab.start_daemons(flags)
    for host in hosts:
        wait_in_order(host, backend)
    return hosts


def assert_only_log_lines(daemon: Daemon) -> None:
    """And none of gRPC's own."""
    for line in daemon.log_text().splitlines():
        json.loads(line)


def test_daemons_need_the_ca_only(fresh_lab: Lab, tmp_path: Path) -> None:
    flags = serve(fresh_lab, Authority(tmp_path / "ours"))
    alpha, beta = start(fresh_lab, flags, "alpha", "beta")
    ping = start_pings(alpha, beta)
    fresh_lab.etcd.stop()
    wait_problem(alpha.daemon, "registry-unreachable")
    fresh_lab.etcd.start()
    wait_status(alpha.daemon, "no problem", lambda s: not s["problems"], 10)
    (peer,) = make_peers(fresh_lab.etcd, 1)
    change_peers(fresh_lab.etcd, "vxlan", put=[peer])
    wait_in_order(alpha, "vxlan")
    assert ping.stop().lost == ()
    assert_only_log_lines(alpha.daemon)
    told = flannelctl(alpha, "leases", *flags)
    assert (told.code, told.err) == (0, "")
    assert peer.subnet in told.out


def test_a_wrong_ca_at_first_contact_ends_the_daemon(fresh_lab: Lab, tmp_path: Path) -> None:
    serve(fresh_lab, Authority(tmp_path / "ours"))
    other = Authority(tmp_path / "other")
    alpha = fresh_lab.add_host("alpha")
    daemon = alpha.start_daemon([f"--etcd-cafile={other.ca}"])
    assert daemon.wait_exit() == EX_CONFIG
    *log, last = daemon.log_text().splitlines()
    reason = f"TLS verification failed: unable to get local issuer certificate (--etcd-cafile {other.ca})"
    assert last == f"flanneld-py: etcd {fresh_lab.etcd.endpoint}: {reason}"
    for line in log:
        json.loads(line)
    told = flannelctl(alpha, "leases", f"--etcd-cafile={other.ca}")
    assert (told.code, told.out) == (1, "")
    assert reason in told.err


def test_a_client_certificate_that_is_not_let_in_ends_the_daemon(fresh_lab: Lab, tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    serve_to_clients_of(fresh_lab, ours, ours.ca)
    certificate, key = other.issue("stranger")
    files = Files(ours.ca, certificate, key)
    for flags in (files.flags[:1], files.flags):
        alpha = fresh_lab.add_host("alpha")
        daemon = alpha.start_daemon(flags)
        assert daemon.wait_exit() == EX_CONFIG
        assert "it refuses our client certificate, or the lack of one" in daemon.log_tail(1)
        fresh_lab.remove_host(alpha)


def test_a_wrong_ca_later_ends_nothing(fresh_lab: Lab, tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    serve(fresh_lab, ours)
    trusted = tmp_path / "trusted.crt"
    shutil.copy(ours.ca, trusted)
    alpha, beta = start(fresh_lab, [f"--etcd-cafile={trusted}"], "alpha", "beta")
    ping = start_pings(alpha, beta)
    shutil.copy(other.ca, trusted)
    status = wait_status(
        alpha.daemon, "a refusal", lambda s: codes(s) == ["registry-refused"], NOTICED_WITHIN
    )
    assert "TLS verification failed" in status["problems"][0]["reason"]
    wait_answers(ping)
    assert alpha.daemon.running
    shutil.copy(ours.ca, trusted)
    wait_status(alpha.daemon, "no problem", lambda s: not s["problems"], 10)
    (peer,) = make_peers(fresh_lab.etcd, 1)
    change_peers(fresh_lab.etcd, "vxlan", put=[peer])
    wait_in_order(alpha, "vxlan")
    assert ping.stop().lost == ()


def test_certificates_are_rotated_while_daemons_run(fresh_lab: Lab, tmp_path: Path) -> None:
    """Ours, which is revoked then; etcd's by another CA; and in the end that of all clients."""
    first, second = Authority(tmp_path / "first"), Authority(tmp_path / "second")
    files = Files(*(tmp_path / name for name in ("ca.crt", "client.crt", "client.key")))
    clients = tmp_path / "clients.crt"
    shutil.copy(first.ca, files.ca)
    shutil.copy(first.ca, clients)
    old = first.issue("old")
    files.put(old)
    revoked = first.revoke()
    etcd = fresh_lab.etcd
    serve_to_clients_of(fresh_lab, first, clients, f"--client-crl-file={revoked}")
    alpha, beta = start(fresh_lab, files.flags, "alpha", "beta")
    ping = start_pings(alpha, beta)
    peers = make_peers(etcd, 4)

    def is_in_force(number: int) -> None:
        change_peers(etcd, "vxlan", put=[peers[number]])
        for host in (alpha, beta):
            wait_in_order(host, "vxlan", 15)
            assert host.daemon.running
            wait_status(host.daemon, "no problem", lambda s: not s["problems"])

    files.put(first.issue("new"))
    for host in (alpha, beta):
        wait_for(partial(events, host.daemon, "registry_reconnect"), NOTICED_WITHIN, "a reconnect")
    is_in_force(0)
    first.revoke(1)
    with pytest.raises(CommandFailed):
        etcd.ctl("get", "x", f"--cert={old[0]}", f"--key={old[1]}")
    etcd.stop()
    etcd.start()
    is_in_force(1)

    # What etcd shows is by another CA from now on; who trusts both gets over that.
    both = first.ca.read_bytes() + second.ca.read_bytes()
    files.ca.write_bytes(both)
    clients.write_bytes(both)
    serve_to_clients_of(fresh_lab, second, clients)
    is_in_force(2)

    # And the clients' own.
    files.put(second.issue("newest"))
    shutil.copy(second.ca, files.ca)
    shutil.copy(second.ca, clients)
    serve_to_clients_of(fresh_lab, second, clients)
    is_in_force(3)
    assert ping.stop().lost == ()
    for host in (alpha, beta):
        assert_only_log_lines(host.daemon)
