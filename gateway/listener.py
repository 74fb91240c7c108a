"""An open port that lets all in who wait, every time the event loop comes round."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable

logger = logging.getLogger(__name__)

_NO_SUCH_ADDRESS = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}
_MAX_AT_ONCE = 64  # connections; the others wait for the streams that are being served
PAUSE_S = 1.0  # when the process has no file descriptor left


class Listener:
    """Listening sockets, one for every address of a host.

    `create_server` of uvloop accepts a single connection in a turn of its loop, as libuv does: when a turn brings
    frames for a thousand streams, that is fifteen connections a second.
    """

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        ssl_context: ssl.SSLContext | None = None,
        handshake_timeout_s: float | None = None,
    ) -> None:
        self._make_protocol = make_protocol
        self._ssl_context = ssl_context
        self._handshake_timeout_s = handshake_timeout_s if ssl_context else None
        self._loop = asyncio.get_running_loop()
        self._openings: set[asyncio.Task[None]] = set()
        self.sockets: list[socket.socket] = []

    async def open(self, host: str, port: int, *, backlog: int, shares_port: bool = False) -> None:
        """Listen. Raises OSError when an address cannot be had."""
        found = await self._loop.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        errors = []
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            try:
                listening = socket.create_server(
                    address, family=family, backlog=backlog, reuse_port=shares_port
                )
            except OSError as error:
                errors.append(error)
                continue
            self.sockets.append(listening)
            listening.setblocking(False)
            self._listen(listening)
        for error in errors:  # a name may have an IPv6 address where there is no IPv6
            if error.errno not in _NO_SUCH_ADDRESS or not self.sockets:
                self.close()
                raise error

    def close(self) -> None:
        """Let nobody in any more; connections that are open stay so."""
        sockets, self.sockets = self.sockets, []
        for listening in sockets:
            self._loop.remove_reader(listening)
            listening.close()

    def _listen(self, listening: socket.socket) -> None:
        if listening in self.sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_MAX_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # no descriptor or no memory is left, and trying at once would only spin
                logger.error("no connection can be accepted for %g s: %s", PAUSE_S, error)
                self._loop.remove_reader(listening)
                self._loop.call_later(PAUSE_S, self._listen, listening)
                return
            connection.setblocking(False)
            opening = self._loop.create_task(self._open(connection), name="connection")
            self._openings.add(opening)
            opening.add_done_callback(self._openings.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                connection,
                ssl=self._ssl_context,
                ssl_handshake_timeout=self._handshake_timeout_s,
            )
        except OSError as error:  # TLS failed, or the client has left
            logger.debug("a connection failed before its first request: %s", error)
