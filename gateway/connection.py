"""One connection of a client: what aiohttp answers by itself is JSON too, and clients that dawdle are cut."""

import asyncio
import json
import logging
import ssl
from http import HTTPStatus

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from common.errors import FleetError, RequestTimedOut
from gateway.listener import Listener
from gateway.native_format import error_json
from gateway.tls import HANDSHAKE_S

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75.0
WRITE_TIMEOUT_S = 60.0  # in which a client must have read something of what waits for it


class Connection(web.RequestHandler):
    """aiohttp's protocol with limits of time, and its own answers in our shape; parsing and all else is aiohttp's.

    Bodies come as they were sent: aiohttp would inflate even those that nobody reads, on the event loop and without
    an end.
    """

    __slots__ = ("_head_timer", "_is_head_begun", "_read_timeout_s", "_write_timer")

    def __init__(self, manager: web.Server, *, read_timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            manager,
            loop=loop,
            access_log=None,
            keepalive_timeout=_KEEP_ALIVE_S,
            auto_decompress=False,
        )
        self._read_timeout_s = read_timeout_s
        self._is_head_begun = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._waits_for_head():
            self._stop_timer()
        elif data and not self._is_head_begun:
            self._await_head()  # once more: its first byte came
            self._is_head_begun = True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._loop.call_later(WRITE_TIMEOUT_S, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _abort(self) -> None:
        """The client has not read for too long: its handler ends with a ConnectionError."""
        self._write_timer = None
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP, and to errors that no middleware saw."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent already")
        if status >= 500:
            logger.error("request failed outside of its handler", exc_info=exc)
            text = error_json(FleetError("Internal error; the server's log has the details"))
        else:
            logger.info("not HTTP: %s", type(exc).__name__)
            text = _json("bad_request", f"This is not a valid HTTP request: {_first_line(message)}")
        response = web.Response(status=status, text=text, content_type="application/json")
        response.force_close()
        return response

    def log_exception(self, *args: object, **values: object) -> None:
        """What aiohttp could not do behind an answer; a body that breaks there is the client's affair."""
        if isinstance(values.get("exc_info"), web.RequestPayloadError):
            logger.info("the rest of a body is broken")
            return
        super().log_exception(*args, **values)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer. What is raised before any middleware runs, for an unknown `Expect`, becomes JSON."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            text = _json("http_error", resp.text or resp.reason)
            resp = web.Response(status=resp.status, text=text, content_type="application/json")
        finished = await super().finish_response(request, resp, start_time)
        if self.transport is not None:
            self._await_head()  # its beginning may have come already, behind the request
        return finished

    def _waits_for_head(self) -> bool:
        """Whether no request is being served: then what has arrived is an unfinished head."""
        is_resting = self._waiter is not None and not self._waiter.done()
        return is_resting or self._request_count == 0

    def _await_head(self) -> None:
        self._stop_timer()
        self._is_head_begun = False
        self._head_timer = self._loop.call_later(self._read_timeout_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self._waits_for_head() or self.transport is None:
            return
        if self._holds_half_a_head():
            error = RequestTimedOut(f"The headers did not arrive within {self._read_timeout_s:g} s")
            self.transport.write(_whole_response(HTTPStatus.REQUEST_TIMEOUT, error_json(error)))
            self.force_close()
        elif self._request_count == 0:
            self.force_close()  # without a word: nothing was asked

    def _holds_half_a_head(self) -> bool:
        """Asks the parser, which tells nothing else: an empty line ends or breaks a head, and means nothing between
        requests.
        """
        try:
            messages, _, _ = self._parser.feed_data(b"\r\n\r\n")
        except HttpProcessingError:
            return True
        return bool(messages)


class Site(web.BaseSite):
    """A port whose connections are ours."""

    def __init__(
        self,
        runner: web.AppRunner,
        hostname: str,
        port: int,
        *,
        read_timeout_s: float,
        ssl_context: ssl.SSLContext | None = None,
        shares_port: bool = False,
    ) -> None:
        super().__init__(runner, ssl_context=ssl_context, backlog=_BACKLOG)
        self._address = hostname, port
        self._read_timeout_s = read_timeout_s
        self._shares_port = shares_port

    @property
    def port(self) -> int:
        """The one that is open, once there is one."""
        return self._server.sockets[0].getsockname()[1] if self._server else self._address[1]

    @property
    def name(self) -> str:
        return f"{'https' if self._ssl_context else 'http'}://{self._address[0]}:{self.port}"

    async def start(self) -> None:
        """Listen. Raises OSError when the port cannot be had."""
        await super().start()
        manager = self._runner.server
        assert manager is not None
        self._server = Listener(
            lambda: Connection(manager, read_timeout_s=self._read_timeout_s),
            ssl_context=self._ssl_context,
            handshake_timeout_s=HANDSHAKE_S,
        )
        await self._server.open(
            *self._address, backlog=self._backlog, shares_port=self._shares_port
        )


def _json(kind: str, message: str) -> str:
    return json.dumps({"error": message, "error_type": kind}, ensure_ascii=False)


def _first_line(message: str | None) -> str:
    """aiohttp shows below it what the client sent."""
    return (message or "").strip().partition("\n")[0].rstrip(":") or "it cannot be read"


def _whole_response(status: HTTPStatus, text: str) -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\nServer: tokenfleet\r\n\r\n"
    )
    return head.encode() + body
