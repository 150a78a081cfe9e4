"""What each backend wants of the kernel, as pure functions; see base for the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flanneld_py.backends.base import Backend
from flanneld_py.backends.hostgw import HostGw
from flanneld_py.backends.vxlan import Vxlan
from flanneld_py.errors import ConfigError
from flanneld_py.model import NetworkConfig

BACKENDS: Mapping[str, Callable[[NetworkConfig], Backend]] = {
    "vxlan": Vxlan.from_config,
    "host-gw": HostGw.from_config,
}


def backend_of(config: NetworkConfig) -> Backend:
    """The backend a config asks for.

    Raises:
        ConfigError: the type is unknown or an option is wrong.
    """
    make = BACKENDS.get(config.backend_type)
    if make is None:
        known = " or ".join(sorted(BACKENDS))
        if config.backend_type == "udp" and not config.backend_options:
            raise ConfigError(
                f'Backend is udp, or absent, which means udp: this version has {known}; set "Backend": '
                f'{{"Type": "vxlan"}}, for example'
            )
        raise ConfigError(
            f"Backend.Type {config.backend_type!r}: not a backend of this version; one of {known}"
        )
    return make(config)
