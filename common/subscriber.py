"""One pub/sub connection for a process, many listeners inside: a connection for each waiter does not scale.

It speaks RESP itself through `hiredis.Reader`: redis-py's asyncio PubSub loses subscriptions when `subscribe()` meets
a reconnect, and costs ten times the processor time. Nothing here needs to be reliable: a lost message leaves a gap that
the reader sees and heals from the journal, so every (re)connect and every overflow only tells listeners to look there.
"""

import asyncio
import logging
import random
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import hiredis
from redis.exceptions import RedisError

from common.wire import BrokerAddress

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_SILENCE_S = 6.0  # a connection that did not even answer PINGs for so long is half open
_LONGEST_PAUSE_S = 0.5
_CHANNELS_PER_COMMAND = 500
_MAX_WAITING = 256  # messages a slow listener may leave unread; more are dropped and read from the journal later

LOOK = None  # an item of a subscription: messages may have been missed, look at the journal


class Subscription:
    """Messages of one channel. Items are bytes, or LOOK."""

    __slots__ = ("_items", "_waiter", "channel", "is_idle", "on_items")

    def __init__(self, channel: bytes) -> None:
        self.channel = channel
        self.is_idle = False  # no item since the last tick
        # Called while somebody waits in `get`; may take what came, and says whether the wait must end all the same.
        self.on_items: Callable[[], bool] | None = None
        self._items: deque[bytes | None] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: bytes | None) -> None:
        self.add(item)
        self.wake()

    def add(self, item: bytes | None) -> None:
        """An item without `wake`, which is called once for all that came together."""
        self.is_idle = False
        if len(self._items) >= _MAX_WAITING:
            self._items.clear()
            item = LOOK
        self._items.append(item)

    def wake(self) -> None:
        """End the wait in `get`, unless `on_items` took all."""
        if self._waiter is None or self._waiter.done():
            return
        if self.on_items is None or self.on_items() or self._items:
            self._waiter.set_result(None)

    def drop_looks(self) -> None:
        """Forget the LOOKs that came so far."""
        self._items = deque(item for item in self._items if item is not LOOK)

    def look_first(self) -> None:
        """Look before anything else."""
        self._items.appendleft(LOOK)

    def take(self) -> bytes | None:
        """The next item if it is a message that is here already, else None: a LOOK stays."""
        return self._items.popleft() if self._items and self._items[0] is not LOOK else None

    async def get(self) -> bytes | None:
        """The next item, or LOOK when `on_items` ended the wait. One caller at a time."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft() if self._items else LOOK


class Subscriber:
    """The process's pub/sub connection. Use as `async with Subscriber(url) as subscriber`."""

    def __init__(self, url: str) -> None:
        self._address = BrokerAddress.parse(url)
        self._subscriptions: dict[bytes, list[Subscription]] = {}
        self._left: list[bytes] = []  # channels that the broker still sends us
        self._told: dict[Subscription, None] = {}  # by what was read last
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="subscriber")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    @property
    def num_channels(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, channel: str) -> Subscription:
        """Start to listen. The first item is LOOK, once the broker has confirmed."""
        subscription = Subscription(channel.encode())
        listeners = self._subscriptions.setdefault(subscription.channel, [])
        listeners.append(subscription)
        if self._connection:
            # also for a second listener: the broker's confirmation is what tells it to look
            self._send((b"SUBSCRIBE", subscription.channel))
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        listeners = self._subscriptions.get(subscription.channel, [])
        listeners.remove(subscription)
        if not listeners:
            del self._subscriptions[subscription.channel]
            self._left.append(subscription.channel)

    def _send(self, *commands: tuple[bytes, ...]) -> None:
        """Commands, and with them what nobody listens to any more: there is no hurry to tell."""
        assert self._connection is not None
        gone = [channel for channel in self._left if channel not in self._subscriptions]
        self._left.clear()
        self._connection.send(*((b"UNSUBSCRIBE", *gone),) if gone else (), *commands)

    async def _run(self) -> None:
        """Keep a connection; after each connect subscribe to everything again."""
        pause_s = 0.02
        while True:
            try:
                connection = await self._address.connect(self._connection_of_ours)
            except (OSError, TimeoutError, ssl.SSLError, RedisError) as error:
                logger.debug("no pub/sub connection: %s", error)
                self._tick()
                await asyncio.sleep(random.uniform(0, pause_s))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
                continue
            pause_s = 0.02
            self._connection = connection
            try:
                await self._attend(connection)
            finally:
                self._connection = None
                connection.abort()

    async def _attend(self, connection: "_Connection") -> None:
        self._left.clear()
        if login := self._address.login:
            connection.send(*login)
        channels = list(self._subscriptions)
        for start in range(0, len(channels), _CHANNELS_PER_COMMAND):
            connection.send((b"SUBSCRIBE", *channels[start : start + _CHANNELS_PER_COMMAND]))
        while not await connection.is_lost_within(_TICK_S):
            self._tick()
            if connection.silence_s > _SILENCE_S:
                return
            self._send((b"PING",))

    def _connection_of_ours(self) -> "_Connection":
        return _Connection(self._deliver, self._wake)

    def _tick(self) -> None:
        """Make listeners that heard nothing look at the journal: heals a lost last message."""
        for listeners in self._subscriptions.values():
            for subscription in listeners:
                if subscription.is_idle:
                    subscription.put(LOOK)
                subscription.is_idle = True

    def _deliver(self, reply: Any) -> None:
        if not isinstance(reply, list) or len(reply) != 3:
            if isinstance(reply, hiredis.ReplyError):
                logger.error("the broker refused the pub/sub connection: %s", reply)
            return
        kind, channel, payload = reply
        listeners = self._subscriptions.get(channel, ())
        if kind == b"message":
            for subscription in listeners:
                subscription.add(payload)
                self._told[subscription] = None
        elif kind == b"subscribe":
            for subscription in listeners:
                subscription.put(LOOK)

    def _wake(self) -> None:
        """Let go those who were told something, in the order in which they were told first."""
        told, self._told = self._told, {}
        for subscription in told:
            subscription.wake()


class _Connection(asyncio.Protocol):
    """The wire: RESP2 commands out, replies to `deliver`, and `on_read` after those that came together."""

    def __init__(self, deliver: Callable[[Any], None], on_read: Callable[[], None]) -> None:
        self._deliver = deliver
        self._on_read = on_read
        self._reader = hiredis.Reader()
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._heard_at = self._loop.time()
        self._transport: asyncio.Transport | None = None

    @property
    def silence_s(self) -> float:
        return self._loop.time() - self._heard_at

    def send(self, *commands: tuple[bytes | str | int, ...]) -> None:
        assert self._transport is not None
        if self._transport.is_closing():  # the next connection subscribes to everything anew
            return
        try:
            self._transport.write(b"".join(map(hiredis.pack_command, commands)))
        except RuntimeError:  # uvloop's word for a connection whose end it has not told yet
            self.connection_lost(None)

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    async def is_lost_within(self, seconds: float) -> bool:
        await asyncio.wait((self._lost,), timeout=seconds)
        return self._lost.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._deliver(reply)
        self._on_read()
