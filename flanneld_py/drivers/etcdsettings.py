"""How to reach etcd, checked before anything is sent. Part of the etcd driver."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flanneld_py.errors import UsageError


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """The etcd options as the user gave them; an empty text means not given."""

    endpoints: tuple[str, ...]
    """URLs with a port."""
    prefix: str
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    username: str = ""
    password: str = ""

    @property
    def trusted_file(self) -> str:
        """The CA certificates to trust for https: those given, else the system's."""
        return self.ca_file or ssl.get_default_verify_paths().cafile or ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One etcd member's client URL."""

    host: str
    """As gRPC wants it: an IPv6 literal in brackets."""
    port: int
    tls: bool

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"


def check(settings: EtcdSettings) -> tuple[Endpoint, ...]:
    """The endpoints, of settings that can work.

    Raises:
        UsageError: they cannot, or would have etcd3 silently speak in clear text.
    """
    endpoints = tuple(map(_parse_endpoint, settings.endpoints))
    if not endpoints:
        raise UsageError("--etcd-endpoints: '': expected at least one, such as http://127.0.0.1:2379")
    if bool(settings.cert_file) != bool(settings.key_file):
        raise UsageError(f"{_certificate_flags(settings)}: expected both or neither")
    if bool(settings.username) != bool(settings.password):
        raise UsageError("--etcd-username and --etcd-password: expected both or neither")
    plain = [endpoint for endpoint in endpoints if not endpoint.tls]
    if plain and (settings.ca_file or settings.cert_file):
        raise UsageError(
            f"--etcd-endpoints: '{plain[0]}': expected https:// because TLS files are given; "
            "over http:// they would not be used and everything would go in clear text"
        )
    if len(plain) < len(endpoints):
        _check_tls_files(settings)
    return endpoints


def _parse_endpoint(text: str) -> Endpoint:
    wrong = UsageError(f"--etcd-endpoints: {text!r}: expected http://HOST:PORT or https://HOST:PORT")
    try:
        url = urlsplit(text.strip())
        host, port = url.hostname, url.port
    except ValueError:
        raise wrong from None
    rest = url.path.strip("/") + url.query + url.fragment + (url.username or "")
    if url.scheme not in {"http", "https"} or not host or not port or rest:
        raise wrong
    return Endpoint(f"[{host}]" if ":" in host else host, port, tls=url.scheme == "https")


def _certificate_flags(settings: EtcdSettings) -> str:
    return f"--etcd-certfile: {settings.cert_file!r}, --etcd-keyfile: {settings.key_file!r}"


def _check_tls_files(settings: EtcdSettings) -> None:
    """Try the files, since gRPC reports unusable ones as nothing but a failed handshake."""
    if not settings.trusted_file:
        raise UsageError("--etcd-cafile: '': expected a file, as this system has no CA certificates itself")
    given = {"cafile": settings.trusted_file, "certfile": settings.cert_file, "keyfile": settings.key_file}
    for flag, path in given.items():
        try:
            if path:
                Path(path).read_bytes()
        except OSError as error:
            raise UsageError(f"--etcd-{flag}: {path!r}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(settings.trusted_file)
    except ssl.SSLError:
        raise UsageError(f"--etcd-cafile: {settings.trusted_file!r}: expected PEM certificates") from None
    try:
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
    except ssl.SSLError:
        raise UsageError(
            f"{_certificate_flags(settings)}: expected a PEM certificate and its private key, unencrypted"
        ) from None
