"""One pub/sub connection for a process, many listeners inside: a connection for each waiter does not scale.

It speaks RESP itself through `hiredis.Reader`: redis-py's asyncio PubSub loses subscriptions when `subscribe()` meets
a reconnect, and costs ten times the processor time. Nothing here needs to be reliable: a lost message leaves a gap that
the reader sees and heals from the journal, so every (re)connect and every overflow only tells listeners to look there.
"""

import asyncio
import itertools
import logging
import random
import ssl
from collections.abc import Callable
from typing import Any, Self

import hiredis
from redis.exceptions import RedisError

from common.wire import BrokerAddress

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_NUM_TURNS = 10  # in a tick: all silent listeners at once would hold everything else up
_SILENCE_S = 6.0  # a connection that did not even answer PINGs for so long is half open
_LONGEST_PAUSE_S = 0.5
_CHANNELS_PER_COMMAND = 500
_MAX_WAITING = 256  # messages a slow listener may leave unread; more are dropped and read from the journal later


class Subscription:
    """Messages of one channel, and whether some may have been missed."""

    __slots__ = ("_messages", "_waiter", "channel", "is_idle", "must_look", "on_messages", "turn")

    def __init__(self, channel: bytes, *, turn: int = 0) -> None:
        self.channel = channel
        self.turn = turn  # of a tick, in which it is its own
        self.is_idle = False  # nothing since the last tick
        self.must_look = False  # at the journal, before any message is taken
        # Called while somebody waits; may take what came, and says whether the wait must end all the same.
        self.on_messages: Callable[[], bool] | None = None
        self._messages: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None

    def add(self, message: bytes) -> None:
        """A message without `wake`, which is called once for all that came together."""
        self.is_idle = False
        if len(self._messages) < _MAX_WAITING:
            self._messages.append(message)
        else:
            self._messages.clear()
            self.must_look = True

    def look(self) -> None:
        """Messages may have been missed."""
        self.is_idle, self.must_look = False, True
        self.wake()

    def wake(self) -> None:
        """End the wait, unless `on_messages` took all."""
        waiter = self._waiter
        if waiter is None:
            return
        if self.on_messages is None or self.on_messages() or self.must_look or self._messages:
            self._waiter = None
            if not waiter.done():  # cancelled, but it has not run yet
                waiter.set_result(None)

    def take(self) -> list[bytes]:
        """The messages that are here."""
        taken, self._messages = self._messages, []
        return taken

    async def wait(self) -> None:
        """Until there is a message or a reason to look, or `on_messages` ends it. One caller at a time."""
        if self.must_look or self._messages:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Subscriber:
    """The process's pub/sub connection. Use as `async with Subscriber(url) as subscriber`."""

    def __init__(self, url: str) -> None:
        self._address = BrokerAddress.parse(url)
        self._subscriptions: dict[bytes, tuple[Subscription, ...]] = {}
        self._left: list[bytes] = []  # channels that the broker still sends us
        self._turns = itertools.cycle(range(_NUM_TURNS))
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
        """Start to listen. Once the broker has confirmed, there is reason to look."""
        subscription = Subscription(channel.encode(), turn=next(self._turns))
        others = self._subscriptions.get(subscription.channel, ())
        self._subscriptions[subscription.channel] = (*others, subscription)
        if self._connection:
            # also for a second listener: the broker's confirmation is what tells it to look
            self._send((b"SUBSCRIBE", subscription.channel))
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        channel = subscription.channel
        others = tuple(one for one in self._subscriptions[channel] if one is not subscription)
        if others:
            self._subscriptions[channel] = others
        else:
            del self._subscriptions[channel]
            self._left.append(channel)

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
                for turn in range(_NUM_TURNS):
                    self._tick(turn)
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
        for turn in itertools.cycle(range(_NUM_TURNS)):
            if await connection.is_lost_within(_TICK_S / _NUM_TURNS):
                return
            self._tick(turn)
            if connection.silence_s > _SILENCE_S:
                return
            if turn == _NUM_TURNS - 1:
                self._send((b"PING",))

    def _connection_of_ours(self) -> "_Connection":
        return _Connection(self._deliver)

    def _tick(self, turn: int) -> None:
        """Make those listeners whose turn it is look at the journal, if they heard nothing for a tick: heals a lost
        last message."""
        for listeners in self._subscriptions.values():
            for subscription in listeners:
                if subscription.turn != turn:
                    continue
                if subscription.is_idle:
                    subscription.look()
                subscription.is_idle = True

    def _deliver(self, replies: list[Any]) -> None:
        """Replies that came together. Listeners wake in the order of their first messages."""
        told: dict[Subscription, None] = {}
        for reply in replies:
            if not isinstance(reply, list) or len(reply) != 3:
                if isinstance(reply, hiredis.ReplyError):
                    logger.error("the broker refused the pub/sub connection: %s", reply)
                continue
            kind, channel, message = reply
            for subscription in self._subscriptions.get(channel, ()):
                if kind == b"message":
                    subscription.add(message)
                    told[subscription] = None
                elif kind == b"subscribe":
                    subscription.look()
        for subscription in told:
            subscription.wake()


class _Connection(asyncio.Protocol):
    """The wire: RESP2 commands out, and to `deliver` the replies that came together."""

    def __init__(self, deliver: Callable[[list[Any]], None]) -> None:
        self._deliver = deliver
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
        next_reply, replies = self._reader.gets, []
        while (reply := next_reply()) is not False:
            replies.append(reply)
        self._deliver(replies)
