"""A wall clock that a program believes in, and that a test turns while the program runs."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "native" / "false_clock.c"


class FalseClock:
    """Of the programs that are started with its `environment`; right until it is turned."""

    def __init__(self, directory: Path) -> None:
        self._offset = directory / "offset"
        library = directory / "false_clock.so"
        compiler = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*compiler, "-o", str(library), str(SOURCE)], check=True)
        self._offset.write_bytes(struct.pack("=q", 0))
        self.environment = {"LD_PRELOAD": str(library), "FALSE_CLOCK": str(self._offset)}

    def turn(self, seconds: int) -> None:
        """By so much from the true time, at once."""
        with self._offset.open("r+b") as file:
            file.write(struct.pack("=q", seconds))
