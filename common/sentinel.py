"""Finds the primary of a broker that Sentinels watch: `redis+sentinel://user:password@host:26379,other:26379/service/0`.

`rediss+sentinel://` speaks TLS to the broker and to the Sentinels. User and password are the broker's; Sentinels are asked
without.
"""

from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.sentinel import Sentinel

SCHEMES = ("redis+sentinel", "rediss+sentinel")
_PORT = 26379
_ASK_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class SentinelSet:
    """Sentinels, and the service that they know."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    has_tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Self | None:
        """None for a URL of another scheme. Raises ValueError for one that names no host or no service."""
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            return None
        login, _, places = parts.netloc.rpartition("@")
        username, _, password = (unquote(part) for part in login.partition(":"))
        service, _, db = parts.path.strip("/").partition("/")
        if not (places and service and (db or "0").isdigit()):
            raise ValueError(
                "a Sentinel URL is redis+sentinel://host:26379,host:26379/service/0. "
                f"Given: {parts.scheme}://{places}{parts.path}"
            )
        hosts = tuple(_host(place) for place in places.split(","))
        has_tls = parts.scheme == SCHEMES[1]
        return cls(hosts, service, int(db or 0), username or None, password or None, has_tls)

    @property
    def login(self) -> dict[str, Any]:
        """What a connection of one's own needs, named as redis-py's `parse_url` does."""
        kind = SSLConnection if self.has_tls else Connection
        login = {"username": self.username, "password": self.password, "db": self.db}
        return {**login, "connection_class": kind}

    def client(self, kind: type[Redis], **options: Any) -> Redis:
        """A client of the primary, whichever server is that."""
        given = {"db": self.db, "username": self.username, "password": self.password}
        return self._sentinel().master_for(self.service, kind, ssl=self.has_tls, **given, **options)

    async def primary(self) -> tuple[str, int]:
        """Where the primary is now. Raises redis-py's MasterNotFoundError, a ConnectionError."""
        return await self._sentinel().discover_master(self.service)

    def _sentinel(self) -> "_BriefSentinel":
        timeouts = {"socket_timeout": _ASK_TIMEOUT_S, "socket_connect_timeout": _ASK_TIMEOUT_S}
        return _BriefSentinel(
            list(self.hosts), sentinel_kwargs={"ssl": self.has_tls, "protocol": 2, **timeouts}
        )


class _BriefSentinel(Sentinel):
    """Keeps no connection: it is asked once for each connection to the broker."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            return await super().discover_master(service_name)
        finally:
            for client in self.sentinels:
                await client.connection_pool.disconnect()


def _host(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return (host, int(port)) if host and port.isdigit() else (place, _PORT)
