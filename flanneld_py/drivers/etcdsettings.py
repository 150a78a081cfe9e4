"""How to reach etcd, checked before anything is sent. Part of the etcd driver."""

from __future__ import annotations

import os
import shlex
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from flanneld_py.errors import UsageError

DEFAULT_ENDPOINTS = ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
DEFAULT_PREFIX = "/coreos.com/network"
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
)
"""Where Debian, Red Hat and SUSE keep the CAs they trust, if OpenSSL names no file."""


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
    password: str = field(default="", repr=False)
    password_file: str = ""
    """Holds the password; read again whenever a token is asked for."""

    @property
    def trusted_file(self) -> str:
        """The CA certificates to trust for https: those given, else the system's."""
        bundle = ssl.get_default_verify_paths().cafile
        return self.ca_file or bundle or next(filter(os.path.exists, SYSTEM_BUNDLES), "")

    @property
    def tls_files(self) -> dict[str, str]:
        """Flag → path of what a TLS connection is made with."""
        files = {
            "--etcd-cafile": self.trusted_file,
            "--etcd-certfile": self.cert_file,
            "--etcd-keyfile": self.key_file,
        }
        return {flag: path for flag, path in files.items() if path}

    @property
    def told_ca(self) -> str:
        """What verifies etcd's certificate, for a message."""
        return f"--etcd-cafile {self.ca_file}" if self.ca_file else f"no --etcd-cafile: {self.trusted_file}"

    @property
    def told_certificate(self) -> str:
        """Our certificate, for a message."""
        if self.cert_file:
            return f"--etcd-certfile {self.cert_file}, --etcd-keyfile {self.key_file}"
        return "no --etcd-certfile and --etcd-keyfile"

    @property
    def told_user(self) -> str:
        """Where user and password come from, for a message."""
        password = f"password-file {self.password_file}" if self.password_file else "password"
        return f"--etcd-username{f' {self.username}' if self.username else ''}, --etcd-{password}"

    def put_line(self, endpoint: str, key: str, value: str) -> str:
        """The line for a shell that stores a value by etcdctl, as we reach etcd; it asks for the password."""
        options = {"endpoints": endpoint, "user": self.username}
        if endpoint.startswith("https:"):
            options |= {"cacert": self.ca_file, "cert": self.cert_file, "key": self.key_file}
        given = [f"--{name}={text}" for name, text in options.items() if text]
        return f"ETCDCTL_API=3 {shlex.join(['etcdctl', *given, 'put', key, value])}"

    def config_set_line(self, value: str) -> str:
        """The line that stores a network config by flannelctl, with what is not as by default.

        Without them it would go to whatever the shell's or the host's own settings name.
        """
        options = {
            "endpoints": ",".join(self.endpoints) if self.endpoints != DEFAULT_ENDPOINTS else "",
            "prefix": self.prefix if self.prefix != DEFAULT_PREFIX else "",
            "cafile": self.ca_file,
            "certfile": self.cert_file,
            "keyfile": self.key_file,
            "username": self.username,
            "password-file": self.password_file,
        }
        given = [f"--etcd-{name}={text}" for name, text in options.items() if text]
        return shlex.join(["flannelctl", *given, "config", "set", value])


class Endpoint(Struct, frozen=True):
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
        raise UsageError(
            f"--etcd-certfile: {settings.cert_file!r}, --etcd-keyfile: {settings.key_file!r}: "
            "expected both or neither"
        )
    _check_credentials(settings)
    plain = [endpoint for endpoint in endpoints if not endpoint.tls]
    if plain and (settings.ca_file or settings.cert_file):
        raise UsageError(
            f"--etcd-endpoints: '{plain[0]}': expected https:// because TLS files are given; "
            "over http:// they would not be used and everything would go in clear text"
        )
    if len(plain) < len(endpoints):
        check_tls_files(settings)
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


# --- user and password ----------------------------------------------------------------------------


def _check_credentials(settings: EtcdSettings) -> None:
    if settings.password and settings.password_file:
        raise UsageError("--etcd-password and --etcd-password-file: expected one of them")
    if bool(settings.username) != bool(settings.password or settings.password_file):
        raise UsageError(
            "--etcd-username and --etcd-password (or --etcd-password-file): expected both or neither"
        )
    for flag, text in (("username", settings.username), ("password", settings.password)):
        if not _is_utf8(text):
            raise UsageError(f"--etcd-{flag}: expected text in UTF-8")
    if settings.password_file:
        current_password(settings)


def current_password(settings: EtcdSettings) -> str:
    """The password as it is now; what is in the file may have been changed since it was read last.

    Raises:
        UsageError: the file holds none, or cannot be read.
    """
    path = settings.password_file
    if not path:
        return settings.password
    try:
        # A pipe would give it only once.
        regular = stat.S_ISREG(Path(path).stat().st_mode)
        text = Path(path).read_text(encoding="utf-8") if regular else ""
    except OSError as error:
        raise UsageError(f"--etcd-password-file: {path!r}: {error.strerror}") from None
    except ValueError:
        regular, text = True, ""
    password = text.removesuffix("\n").removesuffix("\r")
    if not password or "\n" in password:
        expected = "a regular file" if not regular else "one line of UTF-8, the password"
        raise UsageError(f"--etcd-password-file: {path!r}: expected {expected}")
    return password


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- TLS ------------------------------------------------------------------------------------------


def check_tls_files(settings: EtcdSettings) -> None:
    """Try the files, since gRPC reports unusable ones as nothing but a failed handshake.

    Raises:
        UsageError: what is wrong with which.
    """
    if not settings.trusted_file:
        raise UsageError("--etcd-cafile: '': expected a file, as this system has no CA certificates itself")
    for flag, path in settings.tls_files.items():
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise UsageError(f"{flag}: {path!r}: {error.strerror}") from None
    _check_certificates("--etcd-cafile", settings.trusted_file, "PEM certificates")
    if not settings.cert_file:
        return
    _check_certificates("--etcd-certfile", settings.cert_file, "a PEM certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            expected = f"the private key that belongs to --etcd-certfile {settings.cert_file!r}"
        else:
            expected = "a PEM private key, unencrypted"
        raise UsageError(f"--etcd-keyfile: {settings.key_file!r}: expected {expected}") from None


def _check_certificates(flag: str, path: str, expected: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise UsageError(f"{flag}: {path!r}: expected {expected}") from None


def tls_stamp(settings: EtcdSettings) -> tuple[tuple[int, ...], ...]:
    """Differs when one of the TLS files is another, or was written to."""
    return tuple(map(_stamp, settings.tls_files.values()))


def _stamp(path: str) -> tuple[int, ...]:
    try:
        seen = Path(path).stat()
    except OSError:
        return ()
    return seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_size
