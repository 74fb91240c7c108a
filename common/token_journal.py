"""The reading end of a request's journal: every frame once and in order, whatever happens to pub/sub.

The journal is a Redis list and the truth; the channel is only a fast path. A message `base:frame` with the expected
base is taken as it is; anything else (a gap, a reconnect, a second of silence) makes the reader look at the list.

    journal   | 0 | 1 | 2 | 3 | 4 |          next_index = 2
                        ^ message 2:  take it      message 4: a gap, LRANGE 2 -1      message 1: known, drop
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.codec import decode_frame
from common.errors import GenerationFailed, Unavailable
from common.lua import TRANSIENT
from common.messages import Frame, first_chain, next_chain
from common.redis_keys import ModelKeys
from common.subscriber import Subscriber, Subscription

_FRAMES_PER_READ = 256
_LOOK_AGAIN_S = 0.1


class StreamDiverged(GenerationFailed):
    """The stream can not be continued with the text that was already sent."""

    kind = "stream_diverged"


class TokenJournal:
    """Journals of one model."""

    def __init__(
        self, redis: Redis, keys: ModelKeys, subscriber: Subscriber, *, hold_s: float = 30.0
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._subscriber = subscriber
        self._hold_s = hold_s

    @asynccontextmanager
    async def open(self, request_id: str, *, after: int = -1) -> AsyncIterator["JournalReader"]:
        """A reader of the frames behind index `after`. May be opened before the request is enqueued."""
        subscription = self._subscriber.subscribe(self._keys.channel(request_id))
        try:
            yield JournalReader(
                self._redis,
                self._keys,
                request_id,
                subscription,
                after=after,
                hold_s=self._hold_s,
            )
        finally:
            self._subscriber.unsubscribe(subscription)

    async def read(self, request_id: str) -> list[Frame]:
        """All frames that there are now."""
        items = await self._redis.lrange(self._keys.journal(request_id), 0, -1)
        return [decode_frame(item) for item in items]


class JournalReader:
    """Iterates over `(index, frame)` and ends after the terminal frame.

    Raises StreamDiverged when a frame does not chain on what was delivered before, and Unavailable when the broker
    could not be reached for the hold time.
    """

    def __init__(
        self,
        redis: Redis,
        keys: ModelKeys,
        request_id: str,
        subscription: Subscription,
        *,
        after: int,
        hold_s: float,
    ) -> None:
        self._redis = redis
        self._journal = keys.journal(request_id)
        self._subscription = subscription
        self._hold_s = hold_s
        self._chain = first_chain(request_id)
        self._deliver_from = after + 1  # earlier frames are read only to know their chain hash
        self._ready: deque[tuple[int, Frame]] = deque()
        self._num_taken = 0
        self._is_ended = False

    @property
    def next_index(self) -> int:
        """Index of the frame that comes next."""
        return self._ready[0][0] if self._ready else max(self._num_taken, self._deliver_from)

    def __aiter__(self) -> "JournalReader":
        return self

    async def __anext__(self) -> tuple[int, Frame]:
        while not self._ready:
            if self._is_ended:
                raise StopAsyncIteration
            item = await self._subscription.get()
            if item is None or not self._take_message(item):
                await self._look()
        return self._ready.popleft()

    def _take_message(self, message: bytes) -> bool:
        """Take a published frame; False when it shows a gap."""
        base, _, data = message.partition(b":")
        index = int(base)
        if index == self._num_taken:
            self._take(data)
        return index <= self._num_taken

    async def _look(self) -> None:
        """Read what the journal has beyond what was taken."""
        while not self._is_ended:
            first = self._num_taken
            for data in await self._read(first):
                self._take(data)
            if self._num_taken - first < _FRAMES_PER_READ:
                return

    async def _read(self, first: int) -> list[bytes]:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._hold_s
        while True:
            try:
                return await self._redis.lrange(self._journal, first, first + _FRAMES_PER_READ - 1)
            except (*TRANSIENT, RedisError) as error:
                if loop.time() > give_up_at:
                    raise Unavailable(f"the broker does not answer: {error}") from error
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _take(self, data: bytes) -> None:
        if self._is_ended:
            return
        frame = decode_frame(data)
        if frame.chain:  # frames that a script wrote have none: they carry no text
            self._chain = next_chain(self._chain, frame.tokens)
            if frame.chain != self._chain:
                raise StreamDiverged()
        if self._num_taken >= self._deliver_from:
            self._ready.append((self._num_taken, frame))
        self._num_taken += 1
        self._is_ended = frame.is_terminal
