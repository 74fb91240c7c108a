"""Who serves what: workers announce themselves and their model here, gateways read it.

Everything expires by itself: a worker that stops beating disappears after a few leases, a model after a day.
"""

import zlib
from dataclasses import asdict, dataclass

from redis.asyncio import Redis

from common.codec import decode, encode
from common.messages import ModelCard
from common.redis_keys import MODELS, ModelKeys

CARD_TTL_S = 86_400
_WORKER_TTL_S = 60


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker tells of itself at each heartbeat."""

    id: str
    model: str
    state: str = "ready"  # "ready" or "draining"
    slots: int = 0  # requests that it can run at once
    running: int = 0
    waiting: int = 0  # leased, not yet started
    kv_used: float = 0.0  # share of the KV cache in use, 0 to 1
    step_s: float = 0.0  # mean time of a step
    tokens_per_s: float = 0.0
    shards: int = 1
    version: str = ""
    seen_s: float = 0.0  # seconds since it was last heard of; filled in by the reader


class WorkerRegistry:
    """Reads and writes the registry keys of `common.redis_keys`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def announce(self, card: ModelCard, tokenizer: bytes) -> None:
        """Publish a model: its card and its `tokenizer.json`, compressed."""
        keys = ModelKeys(card.model)
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.set(
                keys.tokenizer(card.tokenizer_digest), zlib.compress(tokenizer), ex=CARD_TTL_S
            )
            pipeline.set(keys.card, encode(card), ex=CARD_TTL_S)
            await pipeline.execute()
        await self._redis.zadd(MODELS, {card.model: await self._now_s()})

    async def beat(self, card: ModelCard, status: WorkerStatus, *, lease_s: float) -> bool:
        """Say that this worker lives and decodes. False when the card is gone and must be announced again.

        The heartbeat is prolonged by PEXPIRE where it exists, which works even when Redis is full. Its value is the
        lease in milliseconds: a reaper that finds more than that left knows that the broker's clock was set back.
        """
        keys, now = ModelKeys(card.model), await self._now_s()
        lease_ms = int(lease_s * 1000)
        fields = {name: str(value) for name, value in asdict(status).items()}
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.pexpire(keys.heartbeat(status.id), lease_ms)
            pipeline.expire(keys.card, CARD_TTL_S)
            pipeline.expire(keys.tokenizer(card.tokenizer_digest), CARD_TTL_S)
            pipeline.zadd(keys.workers, {status.id: now})
            pipeline.zremrangebyscore(keys.workers, 0, now - 10 * lease_s)
            pipeline.zremrangebyscore(keys.workers, now + 10 * lease_s, "inf")
            pipeline.expire(keys.workers, CARD_TTL_S)
            pipeline.hset(keys.worker(status.id), mapping=fields)
            pipeline.expire(keys.worker(status.id), _WORKER_TTL_S)
            replies = await pipeline.execute(raise_on_error=False)
        if not replies[0] is True and replies[0] != 1:
            await self._redis.set(keys.heartbeat(status.id), lease_ms, px=lease_ms)
        await self._redis.zadd(MODELS, {card.model: now})
        await self._redis.zremrangebyscore(MODELS, 0, now - CARD_TTL_S)
        return bool(replies[1]) and bool(replies[2])

    async def retire(self, model: str, worker: str) -> None:
        """Forget a worker that has stopped."""
        keys = ModelKeys(model)
        await self._redis.delete(keys.heartbeat(worker), keys.worker(worker))
        await self._redis.zrem(keys.workers, worker)

    async def models(self) -> list[str]:
        """Names of all models that workers have announced, sorted."""
        return sorted(name.decode() for name in await self._redis.zrange(MODELS, 0, -1))

    async def card(self, model: str) -> ModelCard | None:
        data = await self._redis.get(ModelKeys(model).card)
        return decode(ModelCard, data) if data else None

    async def tokenizer(self, model: str, digest: str) -> bytes | None:
        """The `tokenizer.json` that a card names."""
        data = await self._redis.get(ModelKeys(model).tokenizer(digest))
        return zlib.decompress(data) if data else None

    async def workers(self, model: str) -> list[WorkerStatus]:
        """Workers of a model that were heard of within ten leases."""
        keys = ModelKeys(model)
        members = await self._redis.zrange(keys.workers, 0, -1, withscores=True)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for name, _ in members:
                pipeline.hgetall(keys.worker(name.decode()))
            rows = await pipeline.execute()
        now = await self._now_s()
        return [
            _status(row, seen_s=abs(now - seen))  # from the future: the clock was set back since
            for row, (_, seen) in zip(rows, members, strict=True)
            if row
        ]

    async def _now_s(self) -> float:
        """By the broker's clock, which all workers and gateways share; theirs may differ by hours."""
        seconds, microseconds = await self._redis.time()
        return seconds + microseconds / 1e6


def _status(row: dict[bytes, bytes], *, seen_s: float) -> WorkerStatus:
    values = {name.decode(): value.decode() for name, value in row.items()}
    kinds = {name: type(default) for name, default in asdict(WorkerStatus("", "")).items()}
    known = {name: kinds[name](value) for name, value in values.items() if name in kinds}
    return WorkerStatus(**{**known, "seen_s": seen_s})
