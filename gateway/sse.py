"""A response of server-sent events: headers, keep-alive comments, and an end for clients that stopped reading."""

import asyncio
from contextlib import suppress
from typing import Self

from aiohttp import HttpVersion11, web

from gateway.outbox import Outbox

COMMENT = b":\n\n"
WAIT = b": wait\n\n"
_PATIENCE = 4  # keep-alive periods that one write may take before the connection is given up

HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}


class EventStream:
    """Use as `async with EventStream(request, ...) as events`; every way out ends the response.

    `write` waits while the client is slower than its model, so its frames wait in the journal and not here.
    A response that was `cut` lacks HTTP's last chunk: that tells every client that more is to come, elsewhere.
    """

    __slots__ = (
        *("_comment", "_is_chunked", "_is_cut", "_is_writing", "_keep_alive_s", "_loop"),
        *("_outbox", "_protocol", "_request", "_timer", "_written_at", "response", "turn"),
    )

    def __init__(
        self,
        request: web.Request,
        outbox: Outbox,
        *,
        keep_alive_s: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.response = web.StreamResponse(headers={**HEADERS, **(headers or {})})
        self._request = request
        self._outbox = outbox
        self._protocol = request.protocol
        self._is_chunked = request.version >= HttpVersion11  # as aiohttp decides
        self._keep_alive_s = keep_alive_s
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self.turn = asyncio.Lock()  # of who formats and writes, where several feed one response
        self._is_writing = False
        self._is_cut = False
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.response.prepare(self._request)
        await self.write(COMMENT)  # aiohttp holds headers back until there is a body
        self._timer = self._loop.call_later(self._keep_alive_s, self._look)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._timer:
            self._timer.cancel()
        if self._comment and not self._comment.done():
            self._comment.cancel()
        self._outbox.flush()
        if kind is None and not self._is_cut:
            await self.response.write_eof()

    async def write(self, data: bytes) -> None:
        """Send complete events. Raises ConnectionError when the client is gone."""
        self._is_writing, self._written_at = True, self._loop.time()
        self._outbox.flush()
        try:
            await self.response.write(data)
        finally:
            self._is_writing = False

    @property
    def can_send(self) -> bool:
        """Whether the client reads as fast as its model writes."""
        transport = self._protocol.transport
        is_open = transport is not None and not transport.is_closing()
        return is_open and not (self._is_writing or self._protocol.writing_paused)

    def send(self, data: bytes) -> None:
        """`write` without waiting, while `can_send`: a fraction of what aiohttp's writer costs an event."""
        self._written_at = self._loop.time()
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        assert self._protocol.transport is not None
        self._outbox.put(self._protocol.transport, data)

    async def say_wait(self) -> None:
        """Tell that there is nothing to tell: the broker does not answer. Raises ConnectionError."""
        await self.write(WAIT)

    def cut(self) -> None:
        """Close the connection behind the last event."""
        self._is_cut = True
        self._outbox.flush()
        if self._request.transport:
            self._request.transport.close()  # sends what was written before

    def _look(self) -> None:
        """After each period: a comment if nothing was written, an end if a write hangs."""
        quiet_s = self._loop.time() - self._written_at
        if self._is_writing and quiet_s > _PATIENCE * self._keep_alive_s:
            if self._request.transport:
                self._request.transport.abort()
            return
        if not self._is_writing and quiet_s >= self._keep_alive_s * 0.99:
            self._comment = self._loop.create_task(self._write_comment(), name="sse-keep-alive")
            quiet_s = 0.0
        pause_s = (
            self._keep_alive_s - quiet_s if quiet_s < self._keep_alive_s else self._keep_alive_s
        )
        self._timer = self._loop.call_later(pause_s, self._look)

    async def _write_comment(self) -> None:
        with suppress(ConnectionError):  # whoever serves the stream hears of it too
            await self.write(COMMENT)
