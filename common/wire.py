"""Connections to the broker of our own: RESP2 through `hiredis`, for what runs with every request and token.

redis-py gives each command a connection of its pool, a task and two timeouts: three times the processor time of all
else in a round trip. Here commands share a connection. Each is sent at once, and replies come in the same order; one
timer for the oldest command replaces theirs.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import hiredis
from redis.asyncio.connection import (
    BaseParser,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.exceptions import ConnectionError, InvalidResponse, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common.broker_url import BrokerUrlError
from common.sentinel import SentinelSet

_CONNECT_TIMEOUT_S = 2.0
_LOOK_S = 0.5  # how often the oldest command's age is looked at


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the broker is, and who we are there."""

    options: dict[str, Any] = field(repr=False)  # as redis-py's `parse_url` names them
    sentinels: SentinelSet | None

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises BrokerUrlError for a URL that is none of a broker."""
        try:
            sentinels = SentinelSet.parse(url)
            return cls(sentinels.login if sentinels else parse_url(url), sentinels)
        except ValueError as error:
            raise BrokerUrlError(url) from error

    @property
    def login(self) -> list[tuple[str | int, ...]]:
        """The commands that a new connection begins with."""
        commands: list[tuple[str | int, ...]] = []
        password, db = self.options.get("password"), int(self.options.get("db") or 0)
        if password:
            commands.append(("AUTH", self.options.get("username") or "default", password))
        if db:
            commands.append(("SELECT", db))
        return commands

    async def connect(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """A connected protocol. Raises OSError, TimeoutError, ssl.SSLError and RedisError."""
        loop, options = asyncio.get_running_loop(), self.options
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            if options.get("connection_class") is UnixDomainSocketConnection:
                _, protocol = await loop.create_unix_connection(make, options["path"])
                return protocol
            host, port = options.get("host", "localhost"), options.get("port", 6379)
            if self.sentinels:
                host, port = await self.sentinels.primary()
            _, protocol = await loop.create_connection(make, host, port, ssl=self._tls())
        return protocol

    async def is_there(self) -> bool:
        """Whether somebody listens."""
        try:
            connection = await self.connect(_Knock)
        except (OSError, RedisError):  # TimeoutError is an OSError
            return False
        connection.transport.abort()
        return True

    def _tls(self) -> ssl.SSLContext | None:
        """Of redis-py's `ssl_...` options those that name files, and whether the host's name counts."""
        if self.options.get("connection_class") is not SSLConnection:
            return None
        context = ssl.create_default_context(cafile=self.options.get("ssl_ca_certs"))
        if self.options.get("ssl_check_hostname", True) in (False, "False", "false", "0"):
            context.check_hostname = False
        if self.options.get("ssl_cert_reqs") == "none":
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate := self.options.get("ssl_certfile"):
            context.load_cert_chain(certificate, self.options.get("ssl_keyfile"))
        return context


class _Knock(asyncio.Protocol):
    """A connection that is made to see whether it can be."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]


class Wire(asyncio.Protocol):
    """One connection: commands out, each reply to whoever waits for it."""

    def __init__(self, *, timeout_s: float) -> None:
        """Without a reply for `timeout_s` the connection is given up."""
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=BaseParser.parse_error
        )
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def call(self, command: Sequence[Any]) -> asyncio.Future[Any]:
        """Send a command; its reply, where an error is a value. Raises ConnectionError when the connection is lost."""
        reply = self._loop.create_future()
        if not self.is_open:
            reply.set_exception(ConnectionError("the connection to the broker was closed"))
            return reply
        self._waiting.append((reply, self._loop.time()))
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_S, self._look)
        try:
            self._transport.write(hiredis.pack_command(tuple(command)))
        except RuntimeError as error:  # uvloop has not told yet that it is closed
            self.close(ConnectionError(f"the connection to the broker was closed: {error}"))
        return reply

    def close(self, error: Exception | None = None) -> None:
        """Whoever waits gets the error."""
        if self._timer:
            self._timer.cancel()
        if self._transport:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for reply, _ in waiting:
            if not reply.done():
                reply.set_exception(error or ConnectionError("the broker closed the connection"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(ConnectionError(f"the connection to the broker was lost: {exc or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while self._waiting and (reply := self._reader.gets()) is not False:
                waiter, _ = self._waiting.popleft()
                if not waiter.done():  # else its caller was cancelled
                    waiter.set_result(reply)
        except InvalidResponse as error:
            self.close(error)

    def _look(self) -> None:
        """End a connection that does not answer."""
        self._timer = None
        if not self._waiting:
            return
        if self._loop.time() - self._waiting[0][1] > self._timeout_s:
            self.close(RedisTimeoutError(f"the broker did not answer for {self._timeout_s:g} s"))
        else:
            self._timer = self._loop.call_later(_LOOK_S, self._look)


class SharedWire:
    """The connection that a process's commands share, opened when it is needed."""

    def __init__(self, address: BrokerAddress, *, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._wire: Wire | None = None
        self._opening: asyncio.Task[Wire] | None = None
        self._is_closed = False

    async def call(self, command: Sequence[Any]) -> Any:
        """The reply to a command. Raises RedisError: also what the broker answers with, and after `close`."""
        if self._is_closed:
            raise ConnectionError("the client was closed")
        wire = self._wire
        if wire is None or not wire.is_open:
            wire = await self._opened()
        reply = await wire.call(command)
        if isinstance(reply, Exception):
            if isinstance(reply, ReadOnlyError):  # a replica by now: the next connection asks anew
                wire.close(reply)
            raise reply
        return reply

    async def close(self) -> None:
        self._is_closed = True
        if self._opening:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._wire:
            self._wire.close()

    async def _opened(self) -> Wire:
        """A connection, one attempt for all who wait for it."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(), name="connect to the broker")
            self._opening.add_done_callback(self._note_opened)
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if opening.cancelled() and not (task and task.cancelling()):  # by `close`
                raise ConnectionError("the client was closed") from None
            raise

    def _note_opened(self, task: "asyncio.Task[Wire]") -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._wire = task.result()

    async def _open(self) -> Wire:
        try:
            wire = await self._address.connect(lambda: Wire(timeout_s=self._timeout_s))
        except TimeoutError as error:
            raise RedisTimeoutError("the broker could not be reached in time") from error
        except OSError as error:
            raise ConnectionError(f"the broker cannot be reached: {error}") from error
        try:
            for command in self._address.login:
                reply = await wire.call(command)
                if isinstance(reply, Exception):
                    raise reply
        except BaseException:
            wire.close()
            raise
        return wire
