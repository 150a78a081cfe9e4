"""How the bench's figures are shown: row by row a path, its median, range, and ratio to vxlan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from flanneld_py.lab.benchpaths import BASE
from flanneld_py.lab.benchsamples import LARGE, SMALL, Sample

_ROW = 14
_CELL = 36


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    figure: Callable[[Sample], float]
    digits: int = 0


_BLOCKS = (
    (
        _Column("TCP, 1 stream, Gbit/s", lambda sample: sample.tcp, 1),
        _Column("TCP, 4 streams, Gbit/s", lambda sample: sample.tcp4, 1),
        _Column("CPU s per GB, 1 stream", lambda sample: sample.tcp_cpu, 2),
    ),
    (
        _Column(f"UDP {SMALL} bytes, 1000/s delivered", lambda sample: sample.small),
        _Column(f"UDP {LARGE} bytes, 1000/s delivered", lambda sample: sample.large),
        _Column(f"CPU µs per datagram of {SMALL} bytes", lambda sample: sample.small_cpu, 1),
    ),
    (
        _Column("round trip, median, µs", lambda sample: sample.trip),
        _Column("round trip, p99, µs", lambda sample: sample.trip_p99),
    ),
)
LEGEND = (
    "median (lowest to highest), x median of the ratios to vxlan of the same round.",
    "CPU: all that the machine worked meanwhile (/proc/stat), both ends and others' work included.",
    "UDP: counted at the receiver; one process sends as fast as it can, on the CPUs that carry its packets.",
    "Round trip: a datagram of 64 bytes from process to process and back, the two on different processors.",
)


def table(samples: Mapping[str, Sequence[Sample]]) -> list[str]:
    """Path by path, with an empty line between the blocks of figures."""
    lines = []
    for block in _BLOCKS:
        lines += ["", " " * _ROW + "".join(f"{column.title:<{_CELL}}" for column in block).rstrip()]
        for path, taken in samples.items():
            cells = (f"{_cell(column, taken, samples[BASE]):<{_CELL}}" for column in block)
            lines.append(f"{path:<{_ROW}}{''.join(cells)}".rstrip())
    small = _lost(SMALL, {path: [sample.small_lost for sample in taken] for path, taken in samples.items()})
    large = _lost(LARGE, {path: [sample.large_lost for sample in taken] for path, taken in samples.items()})
    return [*lines, "", small, large]


def _lost(size: int, shares: Mapping[str, Sequence[float]]) -> str:
    told = ", ".join(f"{path} {median(share):.0f} %" for path, share in shares.items())
    return f"lost of {size} bytes: {told}"


def _cell(column: _Column, taken: Sequence[Sample], base: Sequence[Sample]) -> str:
    values = [column.figure(sample) for sample in taken]
    ratio = median(value / other for value, other in zip(values, map(column.figure, base), strict=True))
    middle, least, most = (
        f"{value:.{column.digits}f}" for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {most}) x{ratio:.2f}"
