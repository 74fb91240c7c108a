"""What befalls the broker and the way to it. A fault is a coroutine that returns when it is over."""

import asyncio
import signal

from tests.chaos.arena import Arena
from tests.chaos.client import Observation
from tests.chaos.process_faults import CLOCK_SHIFT_S, gateway_of, shift_clocks


async def cut_channels(arena: Arena, seen: Observation) -> None:
    await arena.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


async def cut_half(arena: Arena, seen: Observation) -> None:
    own = await arena.redis.client_id()
    for client in await arena.redis.client_list():
        if client["id"] != str(own) and arena.draw.random() < 0.5:
            await arena.redis.execute_command("CLIENT", "KILL", "ID", client["id"])


async def _mode(arena: Arena, mode: str, for_s: float) -> None:
    """Bytes are missing afterwards, so no connection may go on."""
    arena.proxy.mode = mode
    await asyncio.sleep(for_s)
    arena.proxy.cut()
    arena.proxy.mode = "pass"


async def drop_replies(arena: Arena, seen: Observation) -> None:
    await _mode(arena, "dropreply", arena.draw.uniform(0.05, 0.5))


async def black_hole(arena: Arena, seen: Observation) -> None:
    await _mode(arena, "blackhole", 4.0)


async def refuse_connections(arena: Arena, seen: Observation) -> None:
    arena.proxy.mode = "reset"
    arena.proxy.cut()
    await asyncio.sleep(1.0)
    arena.proxy.mode = "pass"


async def slow_link(arena: Arena, seen: Observation) -> None:
    arena.proxy.mode = f"delay:{arena.draw.randint(5, 100)}"
    await asyncio.sleep(2.0)
    arena.proxy.mode = "pass"


async def pause_broker(arena: Arena, seen: Observation) -> None:
    arena.broker.signal(signal.SIGSTOP)
    await asyncio.sleep(arena.draw.choice((0.3, 2.0, 4.0)))
    arena.broker.signal(signal.SIGCONT)


async def kill_broker(arena: Arena, seen: Observation) -> None:
    arena.broker.restart()


async def roll_back_broker(arena: Arena, seen: Observation) -> None:
    arena.broker.copy()
    await asyncio.sleep(arena.draw.uniform(0.05, 0.5))
    arena.broker.roll_back()


async def wipe_broker(arena: Arena, seen: Observation) -> None:
    arena.broker.wipe()


async def kill_gateway_and_broker(arena: Arena, seen: Observation) -> None:
    ending = asyncio.create_task(arena.end(gateway_of(arena, seen)))
    arena.broker.wipe()
    await ending
    await arena.replace_missing()


async def fill_memory(arena: Arena, seen: Observation) -> None:
    await arena.redis.config_set("maxmemory", "1mb")
    await asyncio.sleep(2.0)
    await arena.redis.config_set("maxmemory", "1gb")


async def flush_scripts(arena: Arena, seen: Observation) -> None:
    await arena.redis.script_flush()


async def make_sync_slow(arena: Arena, seen: Observation) -> None:
    arena.broker.slow_down_sync(0.9)


async def add_replica(arena: Arena, seen: Observation) -> None:
    await arena.broker.add_replica()


async def fail_over(arena: Arena, seen: Observation) -> None:
    await arena.fail_over()


async def fill_disk(arena: Arena, seen: Observation) -> None:
    await arena.broker.fill_disk(2.0)


async def set_broker_forward(arena: Arena, seen: Observation) -> None:
    await shift_clocks([arena.broker.pid], CLOCK_SHIFT_S)


async def set_broker_back(arena: Arena, seen: Observation) -> None:
    await shift_clocks([arena.broker.pid], -CLOCK_SHIFT_S)
