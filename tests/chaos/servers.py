"""The broker of an arena and what can befall it: lost writes, another clock, a slow or a full disk, a failover."""

import asyncio
import os
import random
import resource
import shutil
from pathlib import Path

from redis.asyncio import Redis

from common.broker import Broker, start_broker
from common.redis_client import open_redis
from tests.chaos.surgery import shift_clock, slow_down_sync

_AOF = "appendonlydir"
_LINK_S = 30.0


class ChaosBroker:
    """A server with an append-only file, and perhaps a replica. `redis` is a client of it, past every proxy."""

    def __init__(self, folder: Path) -> None:
        self.redis: Redis
        self._folder = folder
        self._home = folder / "broker-0"
        self._num_homes = 1
        self._server: Broker
        self._replica: tuple[Path, Broker, Redis] | None = None

    async def start(self) -> None:
        self._server = start_broker(self._home, port=0)
        self.redis = open_redis(self._server.url)

    async def close(self) -> None:
        await self.redis.aclose()
        self._server.kill()
        await self.drop_replica()

    @property
    def port(self) -> int:
        return int(self._server.url.rpartition(":")[2].partition("/")[0])

    @property
    def pid(self) -> int:
        return self._server.pid

    def kill(self) -> None:
        """As a crash does."""
        self._server.kill()

    def restart(self) -> None:
        """kill -9, and up again with what the append-only file kept."""
        self._server.kill()
        self._server.start()

    def copy(self) -> None:
        """Keep what it has written until now, for `roll_back`."""
        shutil.rmtree(self._folder / "older", ignore_errors=True)
        shutil.copytree(self._home / _AOF, self._folder / "older")

    def roll_back(self) -> None:
        """kill -9, and up again with what `copy` kept: the writes since then are lost."""
        self._server.kill()
        shutil.rmtree(self._home / _AOF)
        (self._folder / "older").rename(self._home / _AOF)
        self._server.start()

    def wipe(self) -> None:
        """kill -9, and up again with nothing."""
        self._server.kill()
        shutil.rmtree(self._home / _AOF)
        self._server.start()

    def shift_clock(self, seconds: int) -> None:
        shift_clock(self.pid, seconds)

    def slow_down_sync(self, seconds: float) -> None:
        """Let syncs take so long, until the next restart: writes wait for them, and a crash loses those."""
        slow_down_sync(self.pid, seconds)

    async def fill_disk(self, for_s: float) -> None:
        """Let the append-only file not grow: the server's writes fail as on a full disk, and it refuses more."""
        size = max(path.stat().st_size for path in (self._home / _AOF).iterdir())
        _, most = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, most))
        await asyncio.sleep(for_s)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (most, most))

    async def add_replica(self) -> None:
        """Start another server that follows this one, and wait until it is level."""
        home = self._folder / f"broker-{self._num_homes}"
        self._num_homes += 1
        server = start_broker(home, port=0)
        client = open_redis(server.url)
        self._replica = home, server, client
        await self.redis.config_set("repl-diskless-sync-delay", 0)
        await client.execute_command("REPLICAOF", "127.0.0.1", self.port)
        async with asyncio.timeout(_LINK_S):
            while (await client.info("replication"))["master_link_status"] != "up":
                await asyncio.sleep(0.02)  # nothing announces it

    async def fail_over(self, draw: random.Random) -> None:
        """Promote the replica, and let the old server go on for a moment: its writes since then are lost."""
        assert self._replica is not None, "a failover needs a replica"
        home, server, client = self._replica
        await client.execute_command("REPLICAOF", "NO", "ONE")
        await asyncio.sleep(draw.uniform(0.05, 0.5))
        self._server.kill()
        await self.redis.aclose()
        self._home, self._server, self.redis, self._replica = home, server, client, None

    async def drop_replica(self) -> None:
        if self._replica is not None:
            _, server, client = self._replica
            self._replica = None
            await client.aclose()
            server.kill()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)
