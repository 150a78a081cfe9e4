"""One connection to one etcd member. The part of the etcd driver that knows the package etcd3."""

from __future__ import annotations

import threading

from flanneld_py.drivers import etcdrpc  # noqa: F401 - takes the place of etcd3's stubs, so it comes before etcd3

# isort: split

import etcd3

from flanneld_py.drivers.etcdsettings import Endpoint, EtcdSettings, check_tls_files, tls_stamp
from flanneld_py.errors import Refused, Unreachable, UsageError

WINDOW_BYTES = 4 << 20
RECEIVE_BYTES = 64 << 20
"""gRPC's own limit is 4 MiB, less than a listing of ten thousand records may need."""


class Link:
    """One channel to one endpoint. Given up, it is closed when its last user has left."""

    def __init__(self, endpoint: Endpoint, settings: EtcdSettings, connect_seconds: float) -> None:
        """Returns at once: gRPC connects with the first call. TLS files are read anew for each link.

        Raises:
            Refused: the TLS files have become unusable.
            Unreachable: they went away in this moment.
        """
        self.endpoint = str(endpoint)
        self._settings = settings
        self._lock = threading.Lock()
        self._users = 0
        self._retired = False
        self._stamp = tls_stamp(settings) if endpoint.tls else None
        tls = {}
        if endpoint.tls:
            try:
                check_tls_files(settings)
            except UsageError as error:
                raise Refused(f"etcd {endpoint}: {error}") from None
            tls["ca_cert"] = settings.trusted_file
            if settings.cert_file:
                tls |= {"cert_cert": settings.cert_file, "cert_key": settings.key_file}
        options = _channel_options(connect_seconds)
        try:
            self.client = etcd3.client(endpoint.host, endpoint.port, grpc_options=options, **tls)
        except OSError as error:
            raise Unreachable(f"etcd {endpoint}: cannot read {error.filename}: {error.strerror}") from None

    def is_outdated(self) -> bool:
        """Whether the TLS files are others now, and all of them: they are replaced one by one."""
        if self._stamp is None or tls_stamp(self._settings) == self._stamp:
            return False
        try:
            check_tls_files(self._settings)
        except UsageError:
            return False
        return True

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            self._settle()

    def retire(self) -> None:
        with self._lock:
            self._retired = True
            self._settle()

    def close(self) -> None:
        """End the calls under way, too."""
        self.client.close()

    def _settle(self) -> None:
        if self._retired and not self._users:
            self.client.close()


def _channel_options(connect_seconds: float) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", RECEIVE_BYTES),
        # Keepalive alone finds a frozen server after 25 s and more; with the ping timeout it is within 9 s.
        # etcd takes pings more often than every 5 s, or without a call, for abuse and hangs up.
        ("grpc.keepalive_time_ms", 5500),
        ("grpc.keepalive_timeout_ms", 3000),
        ("grpc.http2.ping_timeout_ms", 3000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 0),
        # Each answer would else be measured by a ping, a third of what an idle connection costs. The window
        # that these pings let grow is large from the beginning.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # By its name a pause, it is the time allowed for connecting.
        ("grpc.min_reconnect_backoff_ms", int(connect_seconds * 1000)),
        ("grpc.initial_reconnect_backoff_ms", 250),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A new channel is to connect at once: not wait out the pause of the one just given up …
        ("grpc.use_local_subchannel_pool", 1),
        # … nor go through a web proxy that the environment happens to name.
        ("grpc.enable_http_proxy", 0),
    ]
