# The pump in C: see pump.h and worker.RunningPump. Only worker.py may make one, as it ends with the process.

from collections.abc import Sequence
from typing import final

# In the order of packet.h's enum drop; the first one, none, is never counted.
DROP_REASONS: tuple[str, ...]
# What Pump.counters answers: send.packets, …, receive.drop.truncated.
COUNTERS: tuple[str, ...]

@final
class Pump:
    # Raises OSError when the descriptors are no TUN with IFF_VNET_HDR and no UDP socket for IPv4.
    def __new__(
        cls,
        tun: int,
        udp: int,
        tso: bool = True,
        uso: bool = True,
        udp_segment: bool = True,
        udp_gro: bool = True,
    ) -> Pump: ...
    @property
    def offloads(self) -> tuple[str, ...]: ...
    def set_table(self, table: bytes, /) -> None: ...
    def counters(self) -> Sequence[int]: ...
    def wait(self, control: int, /) -> str | None: ...
    def park(self) -> None: ...
