"""The promise of tests/conftest.py: with --no-skips nothing passes unrun, without it the omission is loud."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SKIPS = {
    "in the test": "import pytest\ndef test_it():\n    pytest.skip('no such kernel')\n",
    "by a mark": "import pytest\n@pytest.mark.skip(reason='no such kernel')\ndef test_it():\n    pass\n",
    "whole module": "import pytest\npytest.skip('no such kernel', allow_module_level=True)\n",
}


def run_pytest(folder: Path, test: str, *options: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -ra -p no:cacheprovider\n")
    (folder / "test_sample.py").write_text(test)
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(
        command, cwd=folder, env={"CI": "false"}, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("where", SKIPS)
def test_skip_fails_with_no_skips(tmp_path: Path, where: str) -> None:
    result = run_pytest(tmp_path, SKIPS[where], "--no-skips")
    assert result.returncode != 0
    assert "did not run" in result.stdout
    assert "no such kernel" in result.stdout
    assert " skipped" not in result.stdout.splitlines()[-1]


def test_skip_is_loud_without_it(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, SKIPS["in the test"])
    assert result.returncode == 0
    assert "NOT RUN: 1" in result.stdout
    assert "no such kernel" in result.stdout


def test_expected_failure_is_no_skip(tmp_path: Path) -> None:
    test = "import pytest\n@pytest.mark.xfail(reason='known')\ndef test_it():\n    assert False\n"
    assert run_pytest(tmp_path, test, "--no-skips").returncode == 0
