"""Whether broken packets keep arriving, for backends that can do something about it."""

from __future__ import annotations

import structlog

from flanneld_py.core.checksums import MANY, WINDOW, Reading, arrived, recent, too_many
from flanneld_py.daemon.inbox import Problem, boottime
from flanneld_py.drivers.counters import read_udp_checksum_errors
from flanneld_py.errors import KernelError


class ChecksumWatch:
    """Follows the kernel's counter of wrong UDP checksums. Used by one thread only.

    Once too many have come it stays with that: without the offload they stop coming, which is no reason to
    turn it on again.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger().bind(part="checksums")
        self._readings: tuple[Reading, ...] = ()
        self.problem: Problem | None = None

    def look(self, *, wanted: bool) -> Problem | None:
        """Read the counter if that is `wanted`; what is wrong, if anything is."""
        if not wanted:
            self._readings, self.problem = (), None
        elif self.problem is None:
            try:
                latest = Reading(boottime(), read_udp_checksum_errors())
            except KernelError as error:
                self._log.debug("checksums_unknown", reason=str(error))
                return None
            self._readings = recent(self._readings, latest)
            if too_many(self._readings):
                self.problem = self._explain(arrived(self._readings))
        return self.problem

    def _explain(self, count: int) -> Problem:
        reason = (
            f"{count} packets with a wrong UDP checksum came within {WINDOW:g} s ({MANY} are too many): "
            f"TxChecksum auto has turned off the checksum offload of this host's vxlan devices"
        )
        self._log.warning("bad_checksums", reason=reason)
        return Problem(
            "bad-checksums",
            reason,
            'the senders are likely hosts like this one: set "TxChecksum": "off" in Backend, which holds for '
            "all of them; or find others with tcpdump -vv udp",
        )
