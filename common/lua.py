"""Runs the scripts of `common/scripts/`, each of which is one atomic and idempotent transition.

Because they are idempotent, a lost reply is answered by sending the script again; nothing else may be retried, unless
doing it twice is the same as doing it once: `until_answered` is for that.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    TimeoutError,
)

from common.errors import Unavailable
from common.redis_client import BrokerRefuses

TRANSIENT = (
    ConnectionError,
    TimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    OutOfMemoryError,
    ClusterDownError,
    MasterDownError,
    BrokerRefuses,
    OSError,
)
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5

Answer = TypeVar("Answer")


async def until_answered(call: Callable[[], Awaitable[Answer]], *, patience_s: float) -> Answer:
    """The answer of `call`, which is made again while the broker cannot be reached: it must be idempotent.

    Raises Unavailable after `patience_s`.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + patience_s
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except TRANSIENT as error:
            if loop.time() + pause_s > give_up_at:
                raise Unavailable(f"the broker does not answer: {error}") from error
        await asyncio.sleep(random.uniform(0, pause_s))
        pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)


class Scripts:
    """All scripts of the protocol, run by name against one client."""

    def __init__(self, redis: Redis, *, patience_s: float = 1.0) -> None:
        self._redis = redis
        self._patience_s = patience_s
        folder = Path(__file__).parent / "scripts"
        self._sources = {path.stem: path.read_text() for path in sorted(folder.glob("*.lua"))}
        self._shas = {
            name: hashlib.sha1(source.encode()).hexdigest()
            for name, source in self._sources.items()
        }

    async def run(
        self,
        name: str,
        keys: Sequence[str | bytes],
        args: Sequence[Any],
        *,
        patience_s: float | None = None,
    ) -> Any:
        """The reply of a script.

        Raises Unavailable when the broker could not be reached for `patience_s`.
        """
        return (await self.run_all(name, [(keys, args)], patience_s=patience_s))[0]

    async def run_all(
        self,
        name: str,
        calls: Sequence[tuple[Sequence[str | bytes], Sequence[Any]]],
        *,
        patience_s: float | None = None,
    ) -> list[Any]:
        """The replies of one script called with several (keys, args), in one round trip.

        Raises Unavailable when the broker could not be reached for `patience_s`.
        """
        patience_s = self._patience_s if patience_s is None else patience_s
        return await until_answered(lambda: self._evaluate(name, calls), patience_s=patience_s)

    async def _evaluate(
        self, name: str, calls: Sequence[tuple[Sequence[str | bytes], Sequence[Any]]]
    ) -> list[Any]:
        try:
            return await self._send(name, calls)
        except NoScriptError:
            await self._redis.script_load(self._sources[name])
            return await self._send(name, calls)

    async def _send(
        self, name: str, calls: Sequence[tuple[Sequence[str | bytes], Sequence[Any]]]
    ) -> list[Any]:
        sha = self._shas[name]
        if len(calls) == 1:
            keys, args = calls[0]
            return [await self._redis.evalsha(sha, len(keys), *keys, *args)]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for keys, args in calls:
                pipeline.evalsha(sha, len(keys), *keys, *args)
            return await pipeline.execute()
