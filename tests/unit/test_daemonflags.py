"""Every flag of flannel with its default, what the daemon is given, and one line for what is wrong."""

# ruff: noqa: S104 - 0.0.0.0 is a value here, not bound

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from flanneld_py.cli.daemonflags import Given, command, options_of, start
from flanneld_py.cli.flagtable import BOOLEANS, FLAGS, GROUPS
from flanneld_py.cli.variables import misspelt
from flanneld_py.core.goflags import normalise
from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.daemon.options import Options
from flanneld_py.errors import UsageError
from flanneld_py.udp.kept import Kept

NOTHING_KEPT = Kept({}, None)

FLANNEL = {
    # name: kind, default (written from flannel's specification)
    "etcd-endpoints": ("string", "http://127.0.0.1:4001,http://127.0.0.1:2379"),
    "etcd-prefix": ("string", "/coreos.com/network"),
    "etcd-keyfile": ("string", ""),
    "etcd-certfile": ("string", ""),
    "etcd-cafile": ("string", ""),
    "etcd-username": ("string", ""),
    "etcd-password": ("string", ""),
    "iface": ("list", ()),
    "iface-regex": ("list", ()),
    "iface-can-reach": ("string", ""),
    "subnet-file": ("string", "/run/flannel/subnet.env"),
    "public-ip": ("string", ""),
    "public-ipv6": ("string", ""),
    "subnet-lease-renew-margin": ("minutes", 60 * 60),
    "ip-masq": ("bool", False),
    "ip-masq-fully-random-disable": ("bool", False),
    "iptables-resync": ("int", 5),
    "iptables-forward-rules": ("bool", True),
    "ip-blackhole-route": ("bool", False),
    "kube-subnet-mgr": ("bool", False),
    "kube-api-url": ("string", ""),
    "kubeconfig-file": ("string", ""),
    "kube-annotation-prefix": ("string", "flannel.alpha.coreos.com"),
    "net-config-path": ("string", "/etc/kube-flannel/net-conf.json"),
    "set-node-network-unavailable": ("bool", True),
    "healthz-ip": ("string", "0.0.0.0"),
    "healthz-port": ("int", 0),
    "v": ("int", 0),
    "vmodule": ("string", ""),
    "log_backtrace_at": ("string", ""),
}
"""All but version, which is no value."""
KUBERNETES = {
    "kube-subnet-mgr": "true",
    "kube-api-url": "https://192.0.2.1",
    "kubeconfig-file": "/root/.kube/config",
    "kube-annotation-prefix": "example.com",
    "net-config-path": "/etc/net.json",
    "set-node-network-unavailable": "false",
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in FLAGS.values():
        if flag.variable:
            monkeypatch.delenv(flag.variable, raising=False)


def given(*argv: str) -> dict[str, Any]:
    """The values of all flags, by their names."""
    arguments = normalise(argv, FLAGS, BOOLEANS)
    with command.make_context(
        "flanneld-py", list(arguments.flags), obj=Given(tuple(arguments.ignored))
    ) as context:
        return {name: context.params[name.replace("-", "_")] for name in FLAGS if name != "version"}


def options(*argv: str) -> Options:
    arguments = normalise(argv, FLAGS, BOOLEANS)
    with command.make_context(
        "flanneld-py", list(arguments.flags), obj=Given(tuple(arguments.ignored))
    ) as context:
        return options_of(context.params)


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        options(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what there is --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLANNEL)
def test_flannels_flags_have_their_defaults(name: str) -> None:
    kind, default = FLANNEL[name]
    value = given()[name]
    assert value == default
    assert isinstance(value, bool) == (kind == "bool")
    assert (name in BOOLEANS) == (kind == "bool")


@pytest.mark.parametrize("name", [*FLANNEL, "version"])
def test_flannels_flags_are_known_as_such(name: str) -> None:
    assert FLAGS[name].flannel
    assert FLAGS[name].meaning.endswith(".")


def test_nothing_but_these_is_said_to_be_flannels() -> None:
    assert {name for name, flag in FLAGS.items() if flag.flannel} == {*FLANNEL, "version"}


@pytest.mark.parametrize("name", FLAGS)
def test_a_default_may_be_written_out(name: str) -> None:
    flag = FLAGS[name]
    if flag.kind != "list":
        assert given(f"--{name}={flag.default}") == given()


def test_help_has_every_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(["--help"], NOTHING_KEPT) is None
    words = capsys.readouterr().out.split()
    for name in FLAGS:
        assert words.count(f"--{name}") >= 1, name
    for topic in GROUPS:
        assert f"{topic[0].upper()}{topic[1:]}".split()[0] in " ".join(words)


def test_defaults_make_these_options() -> None:
    made = options()
    assert (made.subnet_file, made.state_dir) == (
        Path("/run/flannel/subnet.env"),
        Path("/var/lib/flanneld-py"),
    )
    assert made.etcd.endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert made.lease == LeasePolicy(ttl=86_400, renew_margin=3600, on_loss="hold")
    assert (made.wipe_grace, made.blackhole, made.healthz_port) == (60.0, False, 0)


# --- values ---------------------------------------------------------------------------------------


def test_values_reach_the_options() -> None:
    made = options(
        *("-etcd-endpoints", "https://a:1, https://b:2", "-etcd-prefix=/x//y/", "-etcd-cafile=/ca"),
        *("-etcd-certfile=/cert", "-etcd-keyfile=/key", "-etcd-username=u", "-etcd-password-file=/pw"),
        *("-iface=eth0", "-iface=eth1", "-iface-regex=^10", "-iface-regex=x", "-iface-can-reach=10.0.0.1"),
        *("-public-ip=192.0.2.1", "-public-ipv6=2001:db8::1", "-subnet-lease-ttl=1m30s"),
        *("-subnet-lease-renew-margin=3s", "-on-lease-loss=exit", "-registry-wipe-grace=500ms"),
        *("-ip-blackhole-route", "-healthz-ip=::1", "-healthz-port=0x1f90", "-node-id=n"),
        *("-subnet-file=/s", "-state-dir=/d"),
    )
    etcd = made.etcd
    assert etcd.endpoints == ("https://a:1", "https://b:2")
    assert (etcd.prefix, etcd.ca_file, etcd.cert_file, etcd.key_file) == ("/x/y", "/ca", "/cert", "/key")
    assert (etcd.username, etcd.password, etcd.password_file) == ("u", "", "/pw")
    assert (made.iface, made.iface_regex, made.iface_can_reach) == (
        ("eth0", "eth1"),
        ("^10", "x"),
        "10.0.0.1",
    )
    assert (made.public_ip, made.public_ipv6) == ("192.0.2.1", "2001:db8::1")
    assert made.lease == LeasePolicy(90, 3, "exit")
    assert (made.wipe_grace, made.blackhole) == (0.5, True)
    assert (made.healthz_ip, made.healthz_port) == ("::1", 8080)
    assert (made.node_id, made.subnet_file, made.state_dir) == ("n", Path("/s"), Path("/d"))


@pytest.mark.parametrize(
    ("argv", "policy"),
    [
        ((), LeasePolicy(86_400, 3600)),
        (("--subnet-lease-ttl=2h",), LeasePolicy(7200, 2400)),
        (("--subnet-lease-ttl=5s",), LeasePolicy(5, 1)),
        (("--subnet-lease-renew-margin=1439",), LeasePolicy(86_400, 86_340)),
        (("--subnet-lease-renew-margin=0x10",), LeasePolicy(86_400, 960)),
        (("--subnet-lease-ttl=48h", "--subnet-lease-renew-margin=30h"), LeasePolicy(172_800, 108_000)),
    ],
)
def test_life_and_margin_of_a_lease(argv: tuple[str, ...], policy: LeasePolicy) -> None:
    assert options(*argv).lease == policy


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--subnet-lease-ttl=4s"], "--subnet-lease-ttl '4s': expected whole seconds, at least 5s"),
        (["--subnet-lease-ttl=5.5s"], "--subnet-lease-ttl '5.5s': expected whole seconds, at least 5s"),
        (["--subnet-lease-ttl=60"], "--subnet-lease-ttl '60': expected a number with a unit"),
        (
            ["--subnet-lease-ttl=10s", "--subnet-lease-renew-margin=60"],
            "--subnet-lease-renew-margin '3600s': expected less than the lease's whole life",
        ),
        (
            ["--subnet-lease-ttl=10s", "--subnet-lease-renew-margin=10s"],
            "--subnet-lease-renew-margin '10s': ",
        ),
        (
            ["--subnet-lease-renew-margin=0"],
            "--subnet-lease-renew-margin '0': expected minutes from 1 to 1439, or a duration such as 3s",
        ),
        (["--subnet-lease-renew-margin=1440"], "--subnet-lease-renew-margin '1440': expected minutes from 1"),
        (["--subnet-lease-renew-margin=soon"], "--subnet-lease-renew-margin 'soon': expected a number"),
        (["--on-lease-loss=die"], "--on-lease-loss 'die': expected one of hold, renumber, exit"),
        (["--registry-wipe-grace=-1s"], "--registry-wipe-grace '-1s': expected a number with a unit"),
        (["--healthz-port=health"], "--healthz-port 'health': expected a whole number"),
        (["--healthz-port=65536"], "--healthz-port '65536': expected a port up to 65535"),
        (["--healthz-ip=localhost"], "--healthz-ip 'localhost': expected an IP address"),
        (["--iface-can-reach=example.com"], "--iface-can-reach 'example.com': expected an IP address"),
        (["--iface-regex=10.*", "--iface-regex=("], "--iface-regex '(': expected a regular expression: "),
        (["--iface-regex=eth[[:digit:]]"], "--iface-regex 'eth[[:digit:]]': expected a regular expression "),
        (["--iptables-resync=often"], "--iptables-resync 'often': expected a whole number"),
        (["--iptables-forward-rules=maybe"], "--iptables-forward-rules 'maybe': expected true or false"),
        (["--etcd-prefix=/"], ""),
        (
            ["--forward-accept-in=a b"],
            "--forward-accept-in 'a b': expected a chain of iptables' filter table",
        ),
    ],
)
def test_what_is_wrong(argv: list[str], line: str) -> None:
    if line:
        assert refusal(*argv).startswith(line)
    else:
        assert options(*argv).etcd.prefix == "/"


@pytest.mark.parametrize("name", KUBERNETES)
def test_what_is_for_kubernetes_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = KUBERNETES[name]
    reason = "this daemon keeps leases in etcd (flannel's etcd mode), not in Kubernetes; leave it out"
    assert refusal(f"--{name}={value}") == f"--{name}={value}: {reason}"
    monkeypatch.setenv(FLAGS[name].variable, value)
    assert refusal() == f"{FLAGS[name].variable}={value}: {reason}"
    options(f"--{name}={FLAGS[name].default}")


def test_a_value_apart_from_its_boolean_is_explained() -> None:
    said = refusal("--kube-subnet-mgr", "false")
    assert said.endswith("a boolean's value goes with it: --kube-subnet-mgr=false")


# --- variables ------------------------------------------------------------------------------------


def test_variables_count_unless_empty_or_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_IFACE", "eth0 eth1")
    monkeypatch.setenv("FLANNELD_IP_BLACKHOLE_ROUTE", "T")
    monkeypatch.setenv("FLANNELD_HEALTHZ_PORT", "017")
    monkeypatch.setenv("FLANNELD_PUBLIC_IP", "")
    monkeypatch.setenv("FLANNELD_ON_LEASE_LOSS", "exit")
    monkeypatch.setenv("FLANNELD_LOG_BACKTRACE_AT", "x.go:1")
    monkeypatch.setenv("FLANNELD_VERSION", "true")
    monkeypatch.setenv("FLANNELD_HELP", "true")
    made = options("--on-lease-loss=renumber")
    assert made.iface == ("eth0 eth1",)  # one value per variable
    assert (made.blackhole, made.healthz_port, made.public_ip) == (True, 15, "")
    assert made.lease.on_loss == "renumber"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FLANNELD_IP_BLACKHOLE_ROUTE", "yes", "expected true or false"),
        ("FLANNELD_V", "loud", "expected a whole number"),
        ("FLANNELD_SUBNET_LEASE_TTL", "1s", "expected whole seconds"),
        ("FLANNELD_IFACE_REGEX", "*", "expected a regular expression"),
    ],
)
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert refusal().startswith(f"{variable} '{value}': {expected}")


def test_misspelt_variables_are_named_with_the_nearest() -> None:
    known = [flag.variable for flag in FLAGS.values()]
    assert list(misspelt([*known, "FLANNELD_ENV_FILE", "FLANNELD_VERSION", "FLANNEL_MTU", "PATH"])) == []
    assert list(misspelt(["FLANNELD_XQ", "FLANNELD_IFCE"])) == [
        "FLANNELD_IFCE is no variable of flanneld-py, and is ignored; did you mean FLANNELD_IFACE?",
        "FLANNELD_XQ is no variable of flanneld-py, and is ignored; flanneld-py --help lists all",
    ]


def test_names_of_variables() -> None:
    assert FLAGS["etcd-endpoints"].variable == "FLANNELD_ETCD_ENDPOINTS"
    assert FLAGS["log_backtrace_at"].variable == "FLANNELD_LOG_BACKTRACE_AT"
    assert FLAGS["version"].variable == ""


def test_a_password_is_never_shown() -> None:
    assert "s3cret" not in repr(options("--etcd-username=u", "--etcd-password=s3cret"))


def test_the_version_comes_before_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(["--healthz-port=x", "-version"], NOTHING_KEPT) is None
    assert capsys.readouterr().err.startswith("flanneld-py ")
    with pytest.raises(click.exceptions.Exit):
        given("--version")
