"""TLS of the port: certificate and key from files, which may be replaced while we serve."""

import logging
import ssl
from pathlib import Path

from gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

HANDSHAKE_S = 20.0


class TlsFileError(ValueError):
    """Certificate or key cannot be used; the message says why."""


class Certificate:
    """The certificate that connections are shown, and the context that shows it."""

    def __init__(self, cert: str, key: str) -> None:
        """Raises TlsFileError."""
        self.files = (cert, key)
        self.context = _context(cert, key)

    def reload(self) -> None:
        """Show new connections what the files hold now. Files that do not fit change nothing."""
        try:
            _context(*self.files)  # loading a wrong key into the context in use would break it
            self.context.load_cert_chain(*_paths(*self.files))
        except (TlsFileError, OSError) as error:
            logger.error("the certificate stays as it was: %s", error)
        else:
            logger.info("the certificate was read again")


def certificate_of(settings: GatewaySettings) -> Certificate | None:
    """What HTTPS is served with, if it is. Raises TlsFileError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificate(settings.tls_cert, settings.tls_key)


def _context(cert: str, key: str) -> ssl.SSLContext:
    """Python's defaults for servers, TLS 1.2 and newer."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    cert_path, key_path = _paths(cert, key)
    for name, path in (("certificate", cert_path), ("key", key_path)):
        try:
            path.read_bytes()
        except OSError as error:
            raise TlsFileError(f"cannot read the TLS {name} {path}: {error.strerror}") from error
    try:
        context.load_cert_chain(cert_path, key_path, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise TlsFileError(
            f"the TLS certificate {cert} and the key {key} cannot be used: {reason}. Both must be "
            "PEM, belong together, and the key must have no password"
        ) from error
    return context


def _paths(cert: str, key: str) -> tuple[Path, Path]:
    return Path(cert).expanduser(), Path(key).expanduser()


def _no_password() -> str:
    """OpenSSL would ask the terminal for one."""
    return ""
