"""docs/configuration.md is what the code's tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from flanneld_py.backends import BACKENDS
from flanneld_py.cli.flagtable import FLAGS
from flanneld_py.cli.reference import reference

DOCUMENT = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == reference(), "run `make docs`"


@pytest.mark.parametrize("name", [*(f"--{flag}" for flag in FLAGS), *BACKENDS, "SubnetLen", "DirectRouting"])
def test_everything_is_in_it(name: str) -> None:
    assert f"`{name}`" in DOCUMENT.read_text()
