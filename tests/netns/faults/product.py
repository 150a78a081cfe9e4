"""Which faults are tried on which backends: a reduced product everywhere, the full one with --full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.netns.scenes import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterable


def on(*backends: str, of: Iterable[str] = BACKENDS) -> pytest.MarkDecorator:
    """Parametrise `backend`: these always, the others with --full."""
    return pytest.mark.parametrize(
        "backend",
        [pytest.param(name, marks=[] if name in backends else pytest.mark.full) for name in of],
    )


on_vxlan = on("vxlan")
on_every_backend = on(*BACKENDS)
