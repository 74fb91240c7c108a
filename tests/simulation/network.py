"""The simulated wire between processes and the broker: delays, cut connections, lost requests and lost replies.

A connection is a real asyncio transport for redis-py and for our Subscriber; behind it commands are executed in order,
each after a drawn delay. What a cut does to a request that is under way is drawn, too: not executed, or executed with
its reply lost, possibly long after the client has given up and sent it again on another connection.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hiredis

from tests.simulation.memory_broker import MemoryBroker
from tests.simulation.replies import OK, Error, Status, encode_reply
from tests.simulation.virtual_loop import PROCESS


@dataclass(slots=True)
class Weather:
    """How bad the network is; probabilities are for each delivery."""

    delay_s: float = 0.0005
    cut_before: float = 0.0  # the connection breaks before a request arrives
    cut_after: float = 0.0  # ... after it was executed, before its reply arrives
    ghost: float = 0.0  # of the requests cut before: arrives all the same, up to `ghost_s` later
    ghost_s: float = 3.0
    lose_message: float = 0.0  # a pub/sub connection breaks instead of delivering


class SimNetwork:
    """All connections to one broker."""

    def __init__(self, broker: MemoryBroker, draw: random.Random, weather: Weather) -> None:
        self.broker = broker
        self.weather = weather
        self.is_down = False  # the broker does not run: connections are refused
        self.paused_until = 0.0  # the broker is stopped: it accepts, but answers later
        self.connections: list[SimConnection] = []
        self.num_commands = 0
        self._draw = draw
        self._blocked: list[SimConnection] = []
        broker.on_publish = self._publish

    async def connect(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        process = PROCESS.get()
        await process.turn()
        await asyncio.sleep(self.delay())
        if self.is_down:
            raise ConnectionRefusedError("the broker is down")
        connection = SimConnection(self, protocol, process, self._draw)
        self.connections.append(connection)
        protocol.connection_made(connection)
        return connection

    def delay(self) -> float:
        return self._draw.expovariate(1 / self.weather.delay_s)

    def cut(self, chosen: Callable[["SimConnection"], bool] = lambda connection: True) -> None:
        """Break connections now."""
        for connection in list(self.connections):
            if chosen(connection):
                connection.abort()

    def execute(self, parts: list[bytes]) -> Any:
        self.num_commands += 1
        try:
            return self.broker.execute(*parts)
        except Error as error:
            return error

    def wait_for_entries(self, connection: "SimConnection") -> None:
        self._blocked.append(connection)

    def wake(self) -> None:
        """Something may have been added to a stream."""
        blocked, self._blocked = self._blocked, []
        for connection in blocked:
            connection.try_again()

    def _publish(self, channel: bytes, message: bytes) -> int:
        listeners = [item for item in self.connections if channel in item.channels]
        for connection in listeners:
            connection.push([b"message", channel, message])
        return len(listeners)


class SimConnection(asyncio.Transport):
    """One connection, seen from the client as a transport."""

    def __init__(self, network: SimNetwork, protocol: Any, process: Any, draw: random.Random):
        super().__init__()
        self.process = process
        self.channels: dict[bytes, None] = {}
        self._network = network
        self._protocol = protocol
        self._draw = draw
        self._reader = hiredis.Reader()
        self._loop = asyncio.get_running_loop()
        self._waiting: list[list[bytes]] = []
        self._is_open = True
        self._is_busy = False
        self._free_at = 0.0
        self._outbox: deque[bytes] = deque()  # answers arrive in order, whatever the loop shuffles
        self._block: tuple[list[bytes], float] | None = None
        self._transaction: list[list[bytes]] | None = None

    # The client's side

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return not self._is_open

    def write(self, data: bytes) -> None:
        if not self._is_open:
            return
        self._reader.feed(data)
        while (parts := self._reader.gets()) is not False:
            self._waiting.append(parts)
        self._serve()

    def get_write_buffer_size(self) -> int:
        return 0

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self._is_open:
            self._is_open = False
            self._network.connections.remove(self)
            self._loop.call_soon(self._protocol.connection_lost, None)

    # The broker's side

    def _serve(self) -> None:
        """Take the next request, after its time on the way."""
        if self._is_busy or not self._waiting:
            return
        self._is_busy = True
        self._loop.call_later(self._network.delay(), self._arrive)

    def _arrive(self) -> None:
        network, weather = self._network, self._network.weather
        if network.paused_until > self._loop.time():
            self._loop.call_at(network.paused_until, self._arrive)
            return
        if not self._is_open or network.is_down or self._draw.random() < weather.cut_before:
            self._lose()
            return
        self._is_busy = False
        parts = self._waiting.pop(0)
        name = parts[0].upper()
        if name in (b"SUBSCRIBE", b"UNSUBSCRIBE"):
            self._change_channels(name, parts[1:])
        elif name == b"XREADGROUP" and b"BLOCK" in parts:
            block_ms = int(parts[parts.index(b"BLOCK") + 1])
            self._block = (parts, self._loop.time() + block_ms / 1000)
            self._loop.call_later(block_ms / 1000 + 1e-6, self.try_again)
            self.try_again()
            return  # what follows on this connection waits
        else:
            self._answer(self._execute(name, parts))
            network.wake()
        self._serve()

    def _execute(self, name: bytes, parts: list[bytes]) -> Any:
        if name == b"MULTI":
            self._transaction = []
            return OK
        if name == b"EXEC" and self._transaction is not None:
            queued, self._transaction = self._transaction, None
            return [self._network.execute(item) for item in queued]
        if self._transaction is not None:
            self._transaction.append(parts)
            return Status(b"QUEUED")
        return self._network.execute(parts)

    def try_again(self) -> None:
        """See whether the blocking read has something, or has waited long enough."""
        if self._block is None or not self._is_open:
            return
        parts, until = self._block
        reply = self._network.execute(parts)
        if reply is None and self._loop.time() < until:
            self._network.wait_for_entries(self)
            return
        self._block = None
        self._answer(reply)
        self._serve()

    def _lose(self) -> None:
        """The requests under way do not arrive, or not in time."""
        weather = self._network.weather
        for parts in self._waiting:
            if self._draw.random() < weather.ghost:
                later = self._draw.uniform(0, weather.ghost_s)
                self._loop.call_later(later, self._arrive_late, parts)
        self._waiting.clear()
        self.abort()

    def _arrive_late(self, parts: list[bytes]) -> None:
        if not self._network.is_down:
            self._network.execute(parts)
            self._network.wake()

    def _change_channels(self, name: bytes, channels: list[bytes]) -> None:
        for channel in channels:
            if name == b"SUBSCRIBE":
                self.channels[channel] = None
            else:
                self.channels.pop(channel, None)
            self._answer([name.lower(), channel, len(self.channels)])

    def push(self, message: list[bytes]) -> None:
        if self._draw.random() < self._network.weather.lose_message:
            self.abort()
        else:
            self._answer(message)

    def _answer(self, reply: Any) -> None:
        if self._draw.random() < self._network.weather.cut_after:
            self.abort()
            return
        self._free_at = max(self._free_at, self._loop.time() + self._network.delay())
        self._outbox.append(encode_reply(reply))
        self._loop.call_at(self._free_at, self._deliver)

    def _deliver(self) -> None:
        if not self._is_open:
            return
        if self.process.stopped_until > self._loop.time():  # stays in its socket's buffer
            self._free_at = max(self._free_at, self.process.stopped_until)
            self._loop.call_at(self.process.stopped_until, self._deliver)
            return
        self._protocol.data_received(self._outbox.popleft())
