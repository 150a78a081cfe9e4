"""What each backend wants of the kernel, as pure functions; see base for the contract."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from flanneld_py.backends.alloc import Alloc
from flanneld_py.backends.base import Backend
from flanneld_py.backends.hostgw import HostGw
from flanneld_py.backends.udp import Udp
from flanneld_py.backends.vxlan import Vxlan
from flanneld_py.errors import ConfigError
from flanneld_py.model import NetworkConfig

BACKENDS: Mapping[str, Callable[[NetworkConfig], Backend]] = {
    "vxlan": Vxlan.from_config,
    "host-gw": HostGw.from_config,
    "udp": Udp.from_config,
    "alloc": Alloc.from_config,
}


def backend_of(config: NetworkConfig) -> Backend:
    """The backend a config asks for.

    Raises:
        ConfigError: the type is unknown or an option is wrong.
    """
    make = BACKENDS.get(config.backend_type)
    if make is None:
        *others, last = sorted(BACKENDS)
        known = f"{', '.join(others)} or {last}"
        nearest = difflib.get_close_matches(config.backend_type, BACKENDS, n=1)
        raise ConfigError(
            f'Backend.Type "{config.backend_type}": expected a backend of this version, {known}'
            + (f"; did you mean {nearest[0]}?" if nearest else "; correct it")
        )
    return make(config)
