"""A TCP proxy in front of the broker that misbehaves on command: what lies between a fleet and its broker."""

import asyncio
import socket
import struct
from typing import Self


class FaultProxy:
    """Modes: `pass`, `blackhole` (nothing arrives), `dropreply` (requests arrive, replies do not), `reset`
    (connections are refused), `delay:<ms>`."""

    def __init__(self, upstream_port: int) -> None:
        self.mode = "pass"
        self.num_connections = 0
        self.upstream_port = upstream_port  # of connections that come from now on
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def cut(self) -> None:
        """Break every connection with a reset."""
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        if self.mode == "reset" or not self._server.is_serving():
            _reset(writer)
            return
        self._own(asyncio.current_task())
        self._writers.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:
            self._writers.discard(writer)
            _reset(writer)
            return
        self._writers.add(up_writer)
        self._own(asyncio.create_task(self._pump(reader, up_writer, is_reply=False)))
        self._own(asyncio.create_task(self._pump(up_reader, writer, is_reply=True)))

    def _own(self, task: asyncio.Task) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_reply: bool
    ) -> None:
        try:
            while data := await source.read(65536):
                mode, _, argument = self.mode.partition(":")
                if mode == "blackhole" or (mode == "dropreply" and is_reply):
                    continue
                if mode == "delay":
                    await asyncio.sleep(float(argument) / 1000)
                target.write(data)
                await target.drain()
        except OSError:
            pass  # the other side is gone; so is this one, now
        finally:
            self._writers.discard(target)
            _reset(target)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, not FIN, as a crashed machine's firewall would."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
