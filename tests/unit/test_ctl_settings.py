"""Where flannelctl's settings come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from flanneld_py.cli.ctl import settings as ctl_settings
from flanneld_py.cli.ctl.settings import (
    FLAGS,
    Settings,
    connection_options,
    read_environment_file,
    resolve,
    with_settings,
)
from flanneld_py.errors import UsageError


def test_a_flag_wins_over_its_variable_and_that_over_the_file() -> None:
    flag, variable, file = (
        {name: f"/{place}"}
        for name, place in (
            ("etcd-prefix", "flag"),
            ("FLANNELD_ETCD_PREFIX", "variable"),
            ("FLANNELD_ETCD_PREFIX", "file"),
        )
    )
    assert resolve(flag, variable, file).prefix == "/flag"
    assert resolve({}, variable, file).prefix == "/variable"
    assert resolve({}, {}, file).prefix == "/file"
    assert resolve({}, {}, {}).prefix == "/coreos.com/network"


def test_an_empty_value_is_none() -> None:
    assert resolve(
        {"state-dir": ""}, {"FLANNELD_STATE_DIR": ""}, {"FLANNELD_STATE_DIR": "/x"}
    ).state_dir == Path("/x")


def test_every_flag_arrives() -> None:
    given = {flag.name: f"/{flag.name}" for flag in FLAGS}
    assert resolve(given, {}, {}) == Settings(
        endpoints=("/etcd-endpoints",),
        prefix="/etcd-prefix",
        ca_file="/etcd-cafile",
        cert_file="/etcd-certfile",
        key_file="/etcd-keyfile",
        username="/etcd-username",
        password="/etcd-password",  # noqa: S106 - of nobody
        password_file="/etcd-password-file",  # noqa: S106 - a path
        subnet_file=Path("/subnet-file"),
        state_dir=Path("/state-dir"),
    )


def test_a_password_file_replaces_a_password_of_the_service_and_the_reverse() -> None:
    here, there = {"etcd-password-file": "/secret"}, {"FLANNELD_ETCD_PASSWORD": "service"}
    found = resolve(here, {}, there)
    assert (found.password, found.password_file) == ("", "/secret")
    found = resolve({}, there, {"FLANNELD_ETCD_PASSWORD_FILE": "/secret"})
    assert (found.password, found.password_file) == ("service", "")
    assert "service" not in repr(found)


def test_the_defaults_are_the_daemons() -> None:
    from flanneld_py.cli.daemonflags import command as daemon  # noqa: PLC0415

    defaults = {param.opts[0].removeprefix("--"): param.default for param in daemon.params}
    for flag in FLAGS:
        if flag.name in defaults:
            assert str(defaults[flag.name]) == flag.default, flag.name


def test_endpoints_are_split_and_the_prefix_is_normal() -> None:
    given = {"etcd-endpoints": " http://a:1, http://b:2,", "etcd-prefix": "/x//y/"}
    found = resolve(given, {}, {})
    assert found.endpoints == ("http://a:1", "http://b:2")
    assert found.prefix == "/x/y"
    assert found.config_name == "/x/y/config"
    with pytest.raises(UsageError, match="--etcd-prefix"):
        resolve({"etcd-prefix": "."}, {}, {})


def test_files_beside_the_subnet_file() -> None:
    found = resolve({"subnet-file": "/run/x/a.env"}, {}, {})
    assert found.status_file == Path("/run/x/a.status.json")
    assert found.control_socket == Path("/run/x/a.flanneld-py.sock")


def test_an_environment_file(tmp_path: Path) -> None:
    path = tmp_path / "default"
    path.write_text("# of the service\nFLANNELD_ETCD_PREFIX='/x y'\nOTHER=1\n")
    assert read_environment_file(str(path))["FLANNELD_ETCD_PREFIX"] == "/x y"


def test_what_means_nothing_in_an_environment_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "default"
    path.write_text("FLANNELD_ETCD_ENDPONTS=http://a:1\nbad line\nFLANNELD_ETCD_PREFIX=/x\nOTHER=1\n")
    assert read_environment_file(str(path))["FLANNELD_ETCD_PREFIX"] == "/x"
    assert capsys.readouterr().err.splitlines() == [
        f"flannelctl: {path}: line 2 is no NAME=VALUE, and is ignored",
        f"flannelctl: {path}: FLANNELD_ETCD_ENDPONTS is no variable of flanneld-py, and is ignored; "
        "did you mean FLANNELD_ETCD_ENDPOINTS?",
    ]


def test_export_in_an_environment_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To systemd such a line is none, so that daemon and flannelctl would speak of different networks."""
    path = tmp_path / "default"
    path.write_text("A='\nexport B=1'\n# export C=1\nexport FLANNELD_ETCD_PREFIX=/x\nFLANNELD_IFACE=export\n")
    assert read_environment_file(str(path))["FLANNELD_ETCD_PREFIX"] == "/x"
    assert capsys.readouterr().err == (
        f"flannelctl: {path}: systemd ignores a line with `export`, so the daemon does not get "
        "FLANNELD_ETCD_PREFIX; remove that word\n"
    )


def test_a_misspelt_variable_is_told() -> None:
    variables = {"FLANNELD_IFCE": "s3cret", "FLANNELD_VERSION": "1", "FLANNELD_ETCD_PREFIX": "/a"}
    result: Any = CliRunner().invoke(outer, ["--env-file=/dev/null", "inner"], env=variables)
    assert result.stderr == (
        "flannelctl: FLANNELD_IFCE is no variable of flanneld-py, and is ignored; "
        "did you mean FLANNELD_IFACE?\n"
    )


def test_only_an_environment_file_that_was_asked_for_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(UsageError, match=rf"--env-file {absent}: No such file"):
        read_environment_file(absent)
    monkeypatch.setattr(ctl_settings, "DEFAULT_ENV_FILE", absent)
    assert read_environment_file(None) == {}
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ctl_settings, "DEFAULT_ENV_FILE", str(tmp_path))
    assert read_environment_file(None) == {}
    assert "is not used" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Is a directory"):
        read_environment_file(str(tmp_path))


@click.group()
@connection_options()
def outer() -> None:
    pass


@outer.command()
@click.option("--twice", is_flag=True)
@with_settings
def inner(found: Settings, twice: bool) -> str:
    return found.prefix * (2 if twice else 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--etcd-prefix=/a", "inner"], "/a"),
        (["inner", "--etcd-prefix", "/a"], "/a"),
        (["--etcd-prefix=/a", "inner", "--etcd-prefix=/b", "--twice"], "/b/b"),
        (["inner"], "/variable"),
    ],
)
def test_options_stand_before_or_after_the_command(arguments: list[str], expected: str) -> None:
    result: Any = CliRunner().invoke(
        outer,
        arguments,
        standalone_mode=False,
        env={"FLANNELD_ETCD_PREFIX": "/variable", "FLANNELD_ENV_FILE": "/dev/null"},
    )
    assert result.exception is None
    assert result.return_value == expected


def test_help_of_a_command_does_not_repeat_the_options() -> None:
    assert "--etcd-prefix" in CliRunner().invoke(outer, ["--help"]).output
    assert "--etcd-prefix" not in CliRunner().invoke(outer, ["inner", "--help"]).output
