"""systemd's own opinion of the files in systemd/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.netns.nspawn import SYSTEMD, UNIT

WORST_EXPOSURE = 40
"""Tenths: 0 is none, 100 is all; 20 to 40 is what systemd calls OK."""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with the program's path here."""
    installed = Path(sys.executable).with_name("flanneld-py")
    text = (SYSTEMD / UNIT).read_text()
    assert "\nExecStart=/usr/local/bin/flanneld-py\n" in text
    path = tmp_path / UNIT
    path.write_text(text.replace("/usr/local/bin/flanneld-py", str(installed)))
    return path


def analyze(*arguments: str) -> tuple[int, str]:
    """Exit code, and what is said about mistakes: unknown keys are told, and end it with 0 all the same."""
    done = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


def test_verify_finds_nothing(unit: Path) -> None:
    assert analyze("verify", "--man=no", str(unit)) == (0, "")


def test_verify_would_find_a_wrong_key(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("\nWatchdogSec=", "\nWatchDogSec="))
    assert "WatchDogSec" in analyze("verify", "--man=no", str(unit))[1]


def test_exposure(unit: Path) -> None:
    assert analyze("security", "--offline=yes", f"--threshold={WORST_EXPOSURE}", str(unit)) == (0, "")


def test_exposure_without_the_sandbox_would_be_too_high(unit: Path) -> None:
    kept = [line for line in unit.read_text().splitlines() if not line.startswith("CapabilityBoundingSet")]
    unit.write_text("\n".join(kept))
    assert analyze("security", "--offline=yes", f"--threshold={WORST_EXPOSURE}", str(unit))[0] != 0
