"""What of the etcd driver shows without a server."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from flanneld_py.cli.flagtable import FLAGS
from flanneld_py.drivers import etcdrpc, etcdsettings
from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings
from flanneld_py.drivers.etcdanswers import TRY_TLS, AttemptError, joined
from flanneld_py.errors import Unreachable, UsageError

NEWER = {
    "StatusResponse.raftAppliedIndex",
    "StatusResponse.errors",
    "StatusResponse.dbSizeInUse",
    "StatusResponse.isLearner",
    "WatchCreateRequest.watch_id",
    "WatchCreateRequest.fragment",
    "WatchProgressRequest",
    "WatchRequest.progress_request",
    "WatchResponse.fragment",
}
"""Of our messages, what etcd3's older copy of etcd's .proto files lacks."""


def generated_messages() -> dict[str, Any]:
    """The messages of etcd3's generated stubs, which themselves no longer load."""
    spec = importlib.util.find_spec("etcd3")
    assert spec is not None
    assert spec.submodule_search_locations
    messages: dict[str, Any] = {}
    for name in ("kv_pb2.py", "rpc_pb2.py"):
        source = Path(spec.submodule_search_locations[0], "etcdrpc", name).read_text()
        (packed,) = (
            keyword.value.args[0].value
            for call in ast.walk(ast.parse(source))
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "FileDescriptor"
            for keyword in call.keywords
            if keyword.arg == "serialized_pb"
            and isinstance(keyword.value, ast.Call)
            and isinstance(keyword.value.args[0], ast.Constant)
        )
        assert isinstance(packed, str)
        file = descriptor_pb2.FileDescriptorProto.FromString(packed.encode("latin1"))
        messages |= {message.name: message for message in file.message_type}
    return messages


def facts(message: Any) -> dict[str, Any]:
    """Field → everything the wire and the API depend on; enum → its values."""
    fields = {
        field.name: (
            field.number,
            field.type,
            field.label,
            field.type_name.rpartition(".")[2],
            field.HasField("oneof_index"),
        )
        for field in message.field
    }
    return fields | {enum.name: {v.name: v.number for v in enum.value} for enum in message.enum_type}


def test_messages_are_those_that_etcd3_was_generated_from() -> None:
    theirs = generated_messages()
    newer = set()
    for name, ours in vars(etcdrpc)["_classes"].items():
        described = descriptor_pb2.DescriptorProto()
        ours.DESCRIPTOR.CopyToProto(described)
        if name not in theirs:
            newer.add(name)
            continue
        known = facts(theirs[name])
        for field, fact in facts(described).items():
            if field in known:
                assert fact == known[field], f"{name}.{field}"
            else:
                newer.add(f"{name}.{field}")
    assert newer == NEWER


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )


def test_etcd3_uses_our_messages() -> None:
    code = "from flanneld_py.drivers import etcd, etcdrpc; import etcd3; print(etcd3.etcdrpc is etcdrpc)"
    assert run(code).stdout == "True\n"


def test_nothing_is_written_past_us_when_etcd_is_down() -> None:
    done = run(
        "from flanneld_py.drivers.etcd import *\n"
        "from flanneld_py.errors import Unreachable\n"
        "registry = EtcdRegistry(EtcdSettings(('http://127.0.0.1:1', 'http://no.such.invalid:1'), '/p'))\n"
        "try: registry.list()\n"
        "except Unreachable as error: print(error)\n"
        "registry.close()\n"
    )
    assert done.stderr == ""
    assert done.stdout.startswith("etcd http://127.0.0.1:1: connection refused; http://no.such.invalid:1: ")


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "127.0.0.1:2379",
        "etcd.example:2379",
        "http://127.0.0.1",
        "http://:2379",
        "http://127.0.0.1:0",
        "http://127.0.0.1:65536",
        "http://127.0.0.1:port",
        "http://[::1:2379",
        "http://127.0.0.1:2379/v3",
        "http://127.0.0.1:2379?x=1",
        "http://user@127.0.0.1:2379",
        "unix:///run/etcd.sock",
        "ftp://127.0.0.1:2379",
    ],
)
def test_wrong_endpoint_is_named(endpoint: str) -> None:
    with pytest.raises(UsageError) as caught:
        EtcdRegistry(EtcdSettings(("http://127.0.0.1:2379", endpoint), "/p"))
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    assert str(caught.value) == f"--etcd-endpoints: {endpoint!r}: {expected}"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://127.0.0.1:2379", "http://127.0.0.1:2379"),
        (" http://127.0.0.1:2379/ ", "http://127.0.0.1:2379"),
        ("http://[2001:DB8::1]:2379", "http://[2001:db8::1]:2379"),
        ("https://ETCD.example:2379", "https://etcd.example:2379"),
    ],
)
def test_endpoint_in_use_is_said_in_one_form(given: str, used: str) -> None:
    assert EtcdRegistry(EtcdSettings((given,), "/p")).endpoint == used


@pytest.mark.parametrize(
    ("settings", "flag", "expected"),
    [
        ({"endpoints": ()}, "--etcd-endpoints", "at least one"),
        ({"ca_file": "/ca"}, "--etcd-endpoints: 'http://a:1'", "expected https://"),
        ({"cert_file": "/c", "key_file": "/k"}, "--etcd-endpoints: 'http://a:1'", "expected https://"),
        ({"cert_file": "/c"}, "--etcd-certfile: '/c', --etcd-keyfile: ''", "both or neither"),
        ({"key_file": "/k"}, "--etcd-certfile: '', --etcd-keyfile: '/k'", "both or neither"),
        ({"username": "u"}, "--etcd-username and --etcd-password", "both or neither"),
        ({"password": "p"}, "--etcd-username and --etcd-password", "both or neither"),
        ({"password_file": "/f"}, "--etcd-username and --etcd-password", "both or neither"),
        (
            {"username": "u", "password": "p", "password_file": "/f"},
            "--etcd-password and --etcd-password-file",
            "one of them",
        ),
        ({"username": "u", "password_file": "/nowhere"}, "--etcd-password-file: '/nowhere'", "No such file"),
        ({"username": "u", "password": "p\udcff"}, "--etcd-password: expected", "UTF-8"),
        ({"username": "\udcff", "password": "p"}, "--etcd-username: expected", "UTF-8"),
        ({"prefix": ""}, "--etcd-prefix", "such as"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    settings: dict[str, Any], flag: str, expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        EtcdRegistry(EtcdSettings(**{"endpoints": ("https://b:1", "http://a:1"), "prefix": "/p"} | settings))
    assert str(caught.value).startswith(flag)
    assert expected in str(caught.value)


def test_without_a_ca_file_those_of_the_system_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EtcdSettings(("https://a:1",), "/p")
    bundle = tmp_path / "bundle.pem"
    bundle.touch()
    # What OpenSSL names, else where distributions keep theirs.
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    assert settings.trusted_file == str(bundle)
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    monkeypatch.setattr(etcdsettings, "SYSTEM_BUNDLES", ("/nowhere", str(bundle)))
    assert settings.trusted_file == str(bundle)
    monkeypatch.setattr(etcdsettings, "SYSTEM_BUNDLES", ())
    with pytest.raises(UsageError, match="--etcd-cafile: '': expected a file, as this system has no CA"):
        EtcdRegistry(settings)


# --- what it says ---------------------------------------------------------------------------------


def test_https_is_no_advice_for_an_endpoint_that_is_https() -> None:
    closed = AttemptError(Unreachable, f"connection closed{TRY_TLS}")
    plain, tls = "http://192.0.2.9:2379", "https://192.0.2.9:2379"
    assert str(closed.at(plain)) == f"etcd {plain}: connection closed; if it never worked, try https://"
    assert str(closed.at(tls)) == f"etcd {tls}: connection closed"
    assert str(joined({plain: closed, tls: closed})) == (
        f"etcd {plain}: connection closed; if it never worked, try https://; {tls}: connection closed"
    )


def test_a_refusal_names_what_was_given() -> None:
    file = "/etc/flannel"
    settings = EtcdSettings(("https://192.0.2.9:2379",), "/x", username="root", password_file=file)
    assert settings.told_user == f"--etcd-username root, --etcd-password-file {file}"
    assert settings.told_ca.startswith("no --etcd-cafile: ")
    assert settings.told_certificate == "no --etcd-certfile and --etcd-keyfile"
    certified = EtcdSettings((), "/x", ca_file="/tls/ca", cert_file="/tls/crt", key_file="/tls/key")
    assert certified.told_ca == "--etcd-cafile /tls/ca"
    assert certified.told_certificate == "--etcd-certfile /tls/crt, --etcd-keyfile /tls/key"
    assert certified.told_user == "--etcd-username, --etcd-password"


def test_the_line_for_etcdctl_reaches_etcd_as_we_do() -> None:
    tls = EtcdSettings((), "/x", ca_file="/tls/ca", cert_file="/tls/my crt", key_file="/tls/key")
    assert tls.put_line("https://a:1", "/x/config", "{}") == (
        "ETCDCTL_API=3 etcdctl --endpoints=https://a:1 --cacert=/tls/ca '--cert=/tls/my crt' --key=/tls/key "
        "put /x/config '{}'"
    )
    user = EtcdSettings((), "/x", username="u", password="s3cret")  # noqa: S106 - of nobody
    assert user.put_line("http://a:1", "/x/config", "{}") == (
        "ETCDCTL_API=3 etcdctl --endpoints=http://a:1 --user=u put /x/config '{}'"
    )


def test_the_line_for_flannelctl_reaches_the_same_network() -> None:
    """Without the prefix, pasted, it would have replaced another network's config."""
    blue = EtcdSettings(("http://a:1", "http://b:1"), "/blue", username="u", password="s3cret")  # noqa: S106 - of nobody
    assert blue.config_set_line("{}") == (
        "flannelctl --etcd-endpoints=http://a:1,http://b:1 --etcd-prefix=/blue --etcd-username=u "
        "config set '{}'"
    )
    defaults = (FLAGS["etcd-endpoints"].default.split(","), FLAGS["etcd-prefix"].default)
    usual = EtcdSettings(tuple(defaults[0]), defaults[1])
    assert usual.config_set_line("{}") == "flannelctl config set '{}'"
