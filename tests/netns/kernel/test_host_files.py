"""Sysctls and files against a real kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from flanneld_py.drivers.files import HostFiles
from flanneld_py.model import Scope, State
from tests.netns import inside
from tests.netns.inside import Namespace
from tests.netns.kernel.applying import outcome

if TYPE_CHECKING:
    from pathlib import Path

    from tests.netns.inside import Agent

DEV = "flannel.1"
SCOPE = Scope("/coreos.com/network", ())


def test_sysctls(net: Namespace, agent: Agent) -> None:
    net.ip(f"link add {DEV} type bridge")
    files = agent.make(HostFiles)
    key = f"net/ipv6/conf/{DEV}/accept_ra"
    scope = replace(SCOPE, sysctls=frozenset({key, "net/ipv6/conf/gone.1/accept_ra"}))
    assert files.observe(scope) == State(sysctls={key: "1"})
    assert outcome(files, "set", "sysctls", key, "0") is None
    assert files.observe(scope) == State(sysctls={key: "0"})
    assert net.run("cat", f"/proc/sys/{key}") == "0\n"
    assert outcome(files, "set", "sysctls", "net/ipv6/conf/gone.1/accept_ra", "0") == (
        "cannot write '0' to /proc/sys/net/ipv6/conf/gone.1/accept_ra: No such file or directory (ENOENT)"
    )
    assert outcome(files, "set", "sysctls", key, "many") == (
        f"cannot write 'many' to /proc/sys/{key}: Invalid argument (EINVAL)"
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [("true", "No space left on device (ENOSPC)"), ("mount -o remount,ro", "Read-only file system (EROFS)")],
)
def test_a_disk_that_takes_nothing(net: Namespace, tmp_path: Path, spoil: str, reason: str) -> None:
    script = f"""
        mount -t tmpfs -o size=16k none {tmp_path} && echo old > {tmp_path}/subnet.env &&
        {spoil} {tmp_path} && exec "$@" """
    agent = net.agent("unshare", "--mount", "sh", "-c", script, "sh")
    files = agent.make(HostFiles)
    path = f"{tmp_path}/subnet.env"
    error = outcome(files, "set", "files", path, "new\n" * 10_000)
    assert error == f"cannot write {path}: {reason}"
    assert files.observe(replace(SCOPE, files=frozenset({path}))).files == {path: "old\n"}
    assert agent.call(inside.listing, str(tmp_path)) == ["subnet.env"]
