"""Others who change rules of their own all the time."""

from __future__ import annotations

import subprocess
import threading
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TABLE = "table inet crowd { set s { type mark; }; }"
"""What is to be there before."""


@contextmanager
def crowding(entered: Sequence[str], every: float) -> Iterator[None]:
    """Somebody adds an element to a set of his own, again and again.

    Args:
        entered: the command `nft -i`, and before it what leads into the host's namespace.
        every: seconds.
    """
    stop = threading.Event()
    with subprocess.Popen(entered, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as tool:
        assert tool.stdin is not None
        stdin = tool.stdin

        def feed() -> None:
            for number in count(1):
                if stop.wait(every):
                    return
                stdin.write(f"add element inet crowd s {{ {number} }}\n")
                stdin.flush()

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            yield
        finally:
            stop.set()
            feeder.join()
            stdin.close()
