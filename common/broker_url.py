"""What the URL of a broker may look like, checked before anything starts. Knows no Redis: `serve` needs none."""

from urllib.parse import urlsplit

from common.errors import FleetError

_PLAIN = ("redis", "rediss", "unix")
_SENTINEL = ("redis+sentinel", "rediss+sentinel")


class BrokerUrlError(FleetError, ValueError):
    """The URL of the broker cannot be read."""

    def __init__(self, url: str) -> None:
        scheme, separator, rest = url.rpartition("://")
        place = rest.rpartition("@")[2].partition("?")[0]  # without what may be a password
        super().__init__(
            "`redis_url` must be redis://host:6379/0, rediss://host:6379/0, unix:///path or "
            f"redis+sentinel://host:26379,host:26379/service/0. Given: {scheme}{separator}{place}"
        )


def check_broker_url(url: str) -> None:
    """Raises BrokerUrlError for what people get wrong: the scheme, the port, Sentinels without their service."""
    try:
        is_good = _is_good(url)
    except ValueError:  # of urllib: a port that is no number
        is_good = False
    if not is_good:
        raise BrokerUrlError(url)


def _is_good(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme in _SENTINEL:
        return bool(parts.netloc and parts.path.strip("/"))
    return parts.scheme in _PLAIN and (parts.port is None or parts.port > 0)
