"""etcd with users: passwords by variable and file, that nobody reads elsewhere; tokens that expire."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.errors import Refused, UsageError
from flanneld_py.lab import wait_for
from flanneld_py.lab.process import command_line, descendants
from tests.netns.etcd_servers import PREFIX
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.observing import codes, events, start_pings, wait_answers, wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.registry_clients import seen
from tests.netns.scenes import config
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.drivers.etcd import EtcdRegistry
    from flanneld_py.lab import EtcdServer, Host, Lab
    from tests.netns.etcd_servers import Etcd
    from tests.netns.faults.rows import Matrix

pytestmark = pytest.mark.netns

PASSWORD, NEW_PASSWORD = "s3cret-0f-n0de", "an0ther-s3cret"
ROOT = ("--user", "root:r00t")
EX_CONFIG = 78
TOKEN_SECONDS = 1
"""The shortest life etcd knows; of a simple token from its last use, give or take a second …"""
TOKENS_OVER = 2 * TOKEN_SECONDS + 1
"""… and after so many nobody has one any more. To ask etcd would make one live on."""


def set_up_users(ctl: Callable[..., object], prefix: str) -> None:
    """Switch authentication on: `node` may do what it likes below the prefix, and root everywhere."""
    for command in (
        "user add root:r00t",
        "user grant-role root root",
        "role add node",
        f"role grant-permission node --prefix=true readwrite {prefix}/",
        f"user add node:{PASSWORD}",
        "user grant-role node node",
        "auth enable",
    ):
        ctl(*command.split())


# --- the driver -----------------------------------------------------------------------------------


def test_password_and_what_becomes_of_its_token(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    server.put((f"{PREFIX}/config", "{}"), ("/other/config", "{}"))
    set_up_users(server.etcdctl, PREFIX)

    registry = connect(server.url, username="node", password=PASSWORD)
    with server.counting() as counted:
        listing = registry.list()
        registry.watch(listing.revision, listing.cluster_id).cancel()
    assert counted == {"Authenticate": 1, "Range": 1, "Watch": 1}

    server.kill()
    server.start()  # which has forgotten the tokens it gave out
    stream = registry.watch(listing.revision, listing.cluster_id)
    written = registry.create("subnets/a", "mine", registry.grant(60))
    assert written.ok
    assert seen([next(stream)]) == [("subnets/a", b"mine")]
    stream.cancel()
    server.kill()
    server.start()
    assert len(registry.list().entries) == 2

    for username, password, message in (
        ("node", "wrong", "wrong user or password"),
        ("nobody", PASSWORD, "wrong user or password"),
        ("", "", "wants a user and password"),
    ):
        with pytest.raises(Refused, match=message) as caught:
            connect(server.url, username=username, password=password).list()
        assert PASSWORD not in str(caught.value)
    outside = connect(server.url, prefix="/other", username="node", password=PASSWORD)
    for call in (
        outside.list,
        lambda: outside.put("config", "x"),
        lambda: outside.watch(1, listing.cluster_id),
    ):
        with pytest.raises(Refused, match="permission denied"):
            call()

    server.etcdctl(*ROOT, "auth", "disable")
    assert len(registry.list().entries) == 2


def jwt_flags(directory: Path) -> tuple[str, ...]:
    """A key of our own for tokens that end a second after they were given, used or not."""
    private, public = directory / "jwt.key", directory / "jwt.pub"
    for command in (
        ["genrsa", "-out", str(private), "2048"],
        ["rsa", "-in", str(private), "-pubout", "-out", str(public)],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    token = f"jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl={TOKEN_SECONDS}s"
    return ("--auth-token", token)


@pytest.mark.parametrize("kind", ["simple", "jwt"])
def test_a_watch_and_calls_outlive_their_token(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry], kind: str, tmp_path: Path
) -> None:
    flags = ("--auth-token-ttl", str(TOKEN_SECONDS)) if kind == "simple" else jwt_flags(tmp_path)
    server = servers(*flags).start()
    set_up_users(server.etcdctl, PREFIX)
    registry = connect(server.url, username="node", password=PASSWORD)
    listing = registry.list()
    lease = registry.grant(60)
    stream = registry.watch(listing.revision, listing.cluster_id)
    time.sleep(TOKENS_OVER)
    with server.counting() as counted:
        assert registry.create("subnets/a", "1", lease).ok
    assert counted["Authenticate"] == 1, "the token was still good: the test shows nothing"
    assert registry.keep_alive(lease) == 60
    assert seen([next(stream)]) == [("subnets/a", b"1")]
    known = registry.list()
    time.sleep(TOKENS_OVER)
    with server.counting() as counted:
        again = registry.watch(known.revision, known.cluster_id, resumed=True)
    assert counted["Authenticate"] == 1
    registry.put("subnets/b", "2")
    for each in (stream, again):
        items = [next(each)]
        while not seen(items):
            items.append(next(each))
        assert seen(items) == [("subnets/b", b"2")]
        each.cancel()


def test_a_password_file_is_read_again_when_the_password_was_changed(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry], tmp_path: Path
) -> None:
    server = servers().start()
    set_up_users(server.etcdctl, PREFIX)
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    registry = connect(server.url, username="node", password_file=str(file))
    assert registry.list().entries == ()

    server.etcdctl(*ROOT, "user", "passwd", "node", "--interactive=false", text=f"{NEW_PASSWORD}\n")
    with pytest.raises(Refused, match="wrong user or password"):
        registry.list()
    file.unlink()
    with pytest.raises(Refused, match=f"--etcd-password-file: '{file}': No such file"):
        registry.list()
    file.write_text(NEW_PASSWORD)
    assert registry.list().entries == ()


def test_settings_do_not_show_the_password(connect: Callable[..., EtcdRegistry]) -> None:
    registry = connect("http://127.0.0.1:2379", username="node", password=PASSWORD)
    assert PASSWORD not in repr(vars(registry))


def test_an_unusable_password_file_is_named(connect: Callable[..., EtcdRegistry], tmp_path: Path) -> None:
    file = tmp_path / "password"
    for content, message in (
        (None, "No such file or directory"),
        (b"", "expected one line of UTF-8, the password"),
        (b"\n", "expected one line of UTF-8, the password"),
        (b"s3cret\nmore\n", "expected one line of UTF-8, the password"),
        (b"s3cret\xff", "expected one line of UTF-8, the password"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            connect("http://127.0.0.1:2379", username="node", password_file=str(file))
        assert str(caught.value) == f"--etcd-password-file: '{file}': {message}"
    with pytest.raises(UsageError, match="expected a regular file"):
        connect("http://127.0.0.1:2379", username="node", password_file="/dev/null")  # noqa: S106


# --- daemons --------------------------------------------------------------------------------------


def ask_for_passwords(etcd: EtcdServer, *flags: str) -> None:
    """Of whoever comes to the lab's etcd from now on."""
    etcd.put_config(config("vxlan"))
    etcd.stop()
    etcd.server_flags = flags
    etcd.start()
    set_up_users(etcd.ctl, etcd.prefix)
    etcd.client_flags = ROOT


def change_password(etcd: EtcdServer, password: str) -> None:
    etcd.ctl("user", "passwd", "node", "--interactive=false", text=f"{password}\n")


def everything_readable(host: Host) -> str:
    """What others than root may come to read: logs, state, what the host's files and processes show."""
    files = [*host.directory.rglob("*"), *host.run_directory.glob("*"), *host.state_directory.glob("*")]
    texts = [path.read_text(errors="replace") for path in files if path.is_file()]
    texts += [" ".join(command_line(pid)) for pid in descendants(host.daemon.process.pid)]
    texts += [str(host.daemon.notifications)]
    return "\n".join(texts)


def start(lab: Lab, tmp_path: Path) -> tuple[Host, Host, Path]:
    """One host with the password in a variable, one with it in a file."""
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    alpha, beta = lab.add_hosts("alpha", "beta")
    flags = [*OBSERVED, "--etcd-username=node"]
    alpha.start_daemon([*flags, "-v=1"], env={"FLANNELD_ETCD_PASSWORD": PASSWORD})
    beta.start_daemon([*flags, f"--etcd-password-file={file}"])
    for host in (alpha, beta):
        host.daemon.wait_ready()
        host.attach_pods()
        wait_in_order(host, "vxlan")
    return alpha, beta, file


def test_daemons_outlive_tokens_and_restarts_of_etcd(fresh_lab: Lab, tmp_path: Path, fault: Matrix) -> None:
    etcd = fresh_lab.etcd
    ask_for_passwords(etcd, f"--auth-token-ttl={TOKEN_SECONDS}")
    alpha, beta, _ = start(fresh_lab, tmp_path)
    ping = start_pings(alpha, beta)
    peers = make_peers(etcd, 4)
    for number, peer in enumerate(peers):
        if number % 2:
            etcd.stop()
            etcd.start()
        else:
            # The daemons have nothing to say meanwhile, so their tokens end.
            time.sleep(TOKENS_OVER)
        name = "etcd restarted, users log in anew" if number % 2 else "auth token expired"
        with fault(name, "vxlan", expected="changes are followed", check=None, back_within=10) as row:
            change_peers(etcd, "vxlan", put=[peer])
            row.recovered(alpha, beta)
    # A claim needs a token as well.
    key = alpha.daemon.status()["lease"]["key"]
    etcd.ctl("del", f"{etcd.prefix}/subnets/{key}")
    wait_for(etcd.leases, 5, "alpha to claim again", lambda leases: key in leases)
    assert etcd.requests()["Auth/Authenticate"] > 4, "no token was over"
    assert ping.stop().lost == ()
    for host in (alpha, beta):
        assert PASSWORD not in everything_readable(host)


def test_a_user_is_revoked_and_let_in_again(fresh_lab: Lab, tmp_path: Path, fault: Matrix) -> None:
    """The watch there is goes on being served by etcd; it shows when the next one is opened."""
    etcd = fresh_lab.etcd
    ask_for_passwords(etcd)
    alpha, beta, _ = start(fresh_lab, tmp_path)
    with fault("user revoked", "vxlan", expected="all peers stay", check="registry", says="refused") as row:
        row.stands(alpha, beta)
        etcd.ctl("user", "revoke-role", "node", "node")
        etcd.stop()
        etcd.start()
        row.injected()
        row.seen(alpha, beta)
        row.endures()
        etcd.ctl("user", "grant-role", "node", "node")
        row.recovered(alpha, beta)


def test_a_changed_password_is_taken_from_the_file(fresh_lab: Lab, tmp_path: Path) -> None:
    etcd = fresh_lab.etcd
    ask_for_passwords(etcd)
    alpha, beta, file = start(fresh_lab, tmp_path)
    ping = start_pings(alpha, beta)
    change_password(etcd, NEW_PASSWORD)
    etcd.stop()
    etcd.start()
    for host in (alpha, beta):
        status = wait_status(host.daemon, "a refusal", lambda s: codes(s) == ["registry-refused"], 10)
        assert "wrong user or password" in status["problems"][0]["reason"]
    file.write_text(f"{NEW_PASSWORD}\n")
    wait_status(beta.daemon, "no problem", lambda s: not s["problems"], 10)
    assert alpha.daemon.running
    wait_answers(ping)
    change_password(etcd, PASSWORD)
    wait_status(alpha.daemon, "no problem", lambda s: not s["problems"], 10)
    assert ping.stop().lost == ()
    for host in (alpha, beta):
        shown = everything_readable(host)
        assert PASSWORD not in shown
        assert NEW_PASSWORD not in shown
    assert len(events(alpha.daemon, "registry_refused")) == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"FLANNELD_ETCD_USERNAME": "node", "FLANNELD_ETCD_PASSWORD": NEW_PASSWORD},
            "wrong user or password (--etcd-username node, --etcd-password)",
        ),
        ({}, "wants a user and password (--etcd-username, --etcd-password)"),
    ],
    ids=["wrong", "none"],
)
def test_a_wrong_password_at_first_contact_ends_the_daemon(
    fresh_lab: Lab, given: dict[str, str], reason: str
) -> None:
    ask_for_passwords(fresh_lab.etcd)
    alpha = fresh_lab.add_host("alpha")
    daemon = alpha.start_daemon(env=given)
    assert daemon.wait_exit() == EX_CONFIG
    assert daemon.log_tail(1) == f"flanneld-py: etcd {fresh_lab.etcd.endpoint}: {reason}"
    assert NEW_PASSWORD not in daemon.log_text()
    told = flannelctl(alpha, "leases", env=given)
    assert (told.code, told.out) == (1, "")
    assert reason in told.err
    assert NEW_PASSWORD not in told.err


def test_flannelctl_takes_the_password_from_a_file_and_shows_it_nowhere(
    fresh_lab: Lab, tmp_path: Path
) -> None:
    ask_for_passwords(fresh_lab.etcd)
    alpha, _, file = start(fresh_lab, tmp_path)
    variables = {"FLANNELD_ETCD_USERNAME": "node", "FLANNELD_ETCD_PASSWORD_FILE": str(file)}
    for command in ("leases", "status", "plan", "config get"):
        told = flannelctl(alpha, *command.split(), env=variables)
        assert (told.code, told.err) == (0, ""), command
        assert PASSWORD not in told.out
    told = flannelctl(alpha, "--etcd-username=node", f"--etcd-password={PASSWORD}", "leases", "--json")
    assert told.code == 0
    assert PASSWORD not in told.out
