"""The reading end of a request's journal: every frame once and in order, whatever happens to pub/sub.

The journal is a Redis list and the truth; the channel is only a fast path. A message `base:frame` with the expected
base is taken as it is; anything else (a gap, a reconnect, a second of silence) makes the reader look at the list.
A reader that can restore its request keeps the frames it took: a broker that lost them is given them again.

    journal   | 0 | 1 | 2 | 3 | 4 |          next index: 2
                        ^ message 2:  take it      message 4: a gap, LRANGE 2 -1      message 1: known, drop
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.codec import decode_frame
from common.errors import GenerationFailed, Unavailable
from common.lua import Scripts
from common.messages import Frame, first_chain, next_chain
from common.redis_keys import ModelKeys
from common.subscriber import Subscriber, Subscription

logger = logging.getLogger(__name__)

_FRAMES_PER_READ = 256
_LOOK_AGAIN_S = 0.1
_HOLD_TICK_S = 5.0

# Puts the request and these frames back into a broker that lost them; False when it holds another continuation.
Restore = Callable[[Sequence[bytes]], Awaitable[bool]]


class StreamDiverged(GenerationFailed):
    """The stream can not be continued with the text that was already sent."""

    kind = "stream_diverged"
    http_status = 409


class TokenJournal:
    """Journals of one model."""

    def __init__(
        self,
        redis: Redis,
        keys: ModelKeys,
        subscriber: Subscriber,
        *,
        scripts: Scripts | None = None,
        hold_s: float = 30.0,
    ) -> None:
        self._redis = redis
        self._scripts = scripts or Scripts(redis)
        self._keys = keys
        self._subscriber = subscriber
        self._hold_s = hold_s

    @asynccontextmanager
    async def open(
        self,
        request_id: str,
        *,
        expects: tuple[int, bytes] | None = None,
        restore: Restore | None = None,
    ) -> AsyncIterator["JournalReader"]:
        """A reader of all frames. May be opened before the request is enqueued.

        Args:
            expects: index and chain hash of a frame that the client has: if the journal's differs, it diverged.
            restore: called when the broker has lost the request or frames that were taken.
        """
        subscription = self._subscriber.subscribe(self._keys.channel(request_id))
        reader = JournalReader(
            self._scripts,
            self._keys,
            request_id,
            subscription,
            expects=expects,
            restore=restore,
            hold_s=self._hold_s,
        )
        try:
            yield reader
        finally:
            self._subscriber.unsubscribe(subscription)
            reader.release()

    async def read(self, request_id: str) -> list[Frame]:
        """All frames that there are now."""
        items = await self._redis.lrange(self._keys.journal(request_id), 0, -1)
        return [decode_frame(item) for item in items]


class JournalReader:
    """Iterates over `(index, frame)` and ends after the terminal frame.

    Raises StreamDiverged when a frame does not chain on what was delivered before, and Unavailable when the broker
    could not be reached for the hold time. While it holds, `on_hold` is awaited now and then.
    """

    # One block of memory: among hundreds of streams, what a token's way touches is what it costs.
    __slots__ = (
        *("__weakref__", "_chain", "_error", "_expects", "_hold_s", "_is_ended", "_is_stopped"),
        *("_journal", "_num_taken", "_ready", "_request", "_restore", "_scripts", "_sink"),
        *("_subscription", "_taken", "on_hold"),
    )

    def __init__(
        self,
        scripts: Scripts,
        keys: ModelKeys,
        request_id: str,
        subscription: Subscription,
        *,
        expects: tuple[int, bytes] | None,
        restore: Restore | None,
        hold_s: float,
    ) -> None:
        self.on_hold: Callable[[], Awaitable[None]] | None = None
        self._scripts = scripts
        self._request = keys.request(request_id)
        self._journal = keys.journal(request_id)
        self._expects = expects
        self._restore = restore
        self._taken: list[bytes] = []  # all frames as they were read, if they can be restored
        self._is_stopped = False
        self._subscription = subscription
        self._hold_s = hold_s
        self._chain = first_chain(request_id)
        self._ready: list[tuple[int, Frame]] = []
        self._num_taken = 0
        self._is_ended = False
        self._error: Exception | None = None  # met ahead of the iteration
        self._sink: Callable[[], None] | None = None

    def stop(self) -> None:
        """End the iteration before the next frame."""
        self._is_stopped = True
        self._subscription.look()

    def nothing_missed(self) -> None:
        """The request has only now been enqueued: what the subscription's confirmation tells to look for is not there.

        Should a frame come between all the same, the next one shows the gap, or a second of silence.
        """
        self._subscription.must_look = False

    def listen(self, sink: Callable[[], None]) -> None:
        """Call `sink` when frames come while the iteration waits: what it takes by `take_ready` wakes no task.

        The iteration raises what `sink` raises.
        """
        self._sink = sink
        self._subscription.on_messages = self._offer

    def release(self) -> None:
        """Let go of the sink and of the caller's functions: they hold this reader, and a cycle would keep its frames
        until the collector finds it."""
        self._sink = self._restore = self.on_hold = self._subscription.on_messages = None
        self._taken.clear()

    def _offer(self) -> bool:
        """Let the sink have what came; whether the iteration must go on."""
        assert self._sink is not None
        try:
            self._sink()
        except Exception as error:  # noqa: BLE001 - the iteration raises it
            self._error = error
        return self._is_ended or self._error is not None or bool(self._ready)

    async def catch_up(self) -> None:
        """Take what the journal holds now. Raises StreamDiverged and Unavailable."""
        await self._look()

    def __aiter__(self) -> "JournalReader":
        return self

    async def __anext__(self) -> tuple[int, Frame]:
        while not (self._ready or self._is_stopped):
            if self._error:
                raise self._error
            if self._is_ended:
                break
            await self._subscription.wait()
            if self._subscription.must_look and not self._error:
                self._subscription.must_look = False
                await self._look()
            self._take_messages()
        if self._is_stopped or not self._ready:
            raise StopAsyncIteration
        return self._ready.pop(0)

    def take_ready(self) -> list[tuple[int, Frame]]:
        """The frames that are here already; what is wrong with one is left to the iteration to tell."""
        self._take_messages()
        if self._is_stopped or not self._ready:
            return []
        ready, self._ready = self._ready, []
        if ready[-1][1].failure is not None:
            self._ready.append(ready.pop())
        return ready

    def _take_messages(self) -> None:
        """Take what was published, up to a gap: from there on the journal has it."""
        subscription = self._subscription
        if subscription.must_look or self._is_ended or self._is_stopped or self._error:
            return
        try:
            for message in subscription.take():
                base, _, data = message.partition(b":")
                index = int(base)
                if index == self._num_taken:
                    self._take(data)
                elif index > self._num_taken:
                    subscription.must_look = True
                    return
                elif index < len(self._taken) and not _is_same(self._taken[index], data):
                    raise StreamDiverged()  # the broker was rolled back, and somebody went on from before
        except StreamDiverged as error:
            self._error = error

    async def _look(self) -> None:
        """Read what the journal has beyond what was taken."""
        while not self._is_ended and not self._is_stopped:
            first = self._num_taken
            items, length, is_known = await self._read(first)
            for data in items:
                self._take(data)
            if self._restore and not self._is_ended and (length < first or not is_known):
                await self._put_back(self._restore)
                return
            if self._num_taken - first < _FRAMES_PER_READ:
                return

    async def _read(self, first: int) -> tuple[list[bytes], int, bool]:
        """Frames from `first` on, the journal's length, and whether the request is known.

        By a script, on the connection that all share: hundreds of streams may look at the same time.
        """
        names, last = [self._request, self._journal], first + _FRAMES_PER_READ - 1
        loop = asyncio.get_running_loop()
        give_up_at, next_tick_at = loop.time() + self._hold_s, loop.time()
        while not self._is_stopped:
            try:
                found = await self._scripts.run("look", names, [first, last], patience_s=0)
                items, length, num_known = found
                return items, length, bool(num_known)
            except (Unavailable, RedisError) as error:
                if loop.time() > give_up_at:
                    raise Unavailable(f"the stream cannot be read: {error}") from error
            if self.on_hold and loop.time() >= next_tick_at:
                next_tick_at = loop.time() + _HOLD_TICK_S
                await self.on_hold()
            await asyncio.sleep(_LOOK_AGAIN_S)
        return [], first, True

    async def _put_back(self, restore: Restore) -> None:
        """Give the broker what it lost. Without success the next look tries again."""
        logger.warning(
            "the broker lost a request, giving it back", extra={"frames": self._num_taken}
        )
        try:
            is_ours = await restore(self._taken)
        except (Unavailable, RedisError) as error:
            logger.warning("could not give a request back: %s", error)
            return
        if not is_ours:
            raise StreamDiverged()

    def _take(self, data: bytes) -> None:
        if self._is_ended:
            return
        frame = decode_frame(data)
        if self._expects and self._num_taken <= self._expects[0]:
            self._check_expected(frame)
        if frame.chain:  # frames that a script wrote have none: they carry no text
            self._chain = next_chain(self._chain, frame.tokens)
            if frame.chain != self._chain:
                raise StreamDiverged()
        self._ready.append((self._num_taken, frame))
        if self._restore:
            self._taken.append(data)
        self._num_taken += 1
        self._is_ended = frame.finish is not None or frame.failure is not None

    def _check_expected(self, frame: Frame) -> None:
        """The client has frame `expects[0]`: the journal must have the same, and no end before it."""
        assert self._expects is not None
        index, chain = self._expects
        is_last = self._num_taken == index
        if (is_last and frame.chain != chain) or (not is_last and frame.is_terminal):
            raise StreamDiverged()


def _is_same(one: bytes, other: bytes) -> bool:
    """Whether two frames of one index tell the same; another worker may have measured other times."""
    return one == other or decode_frame(one).chain == decode_frame(other).chain
