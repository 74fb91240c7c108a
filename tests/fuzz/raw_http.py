"""Sends spoiled requests over raw sockets. Whatever comes, the gateway answers in HTTP or closes, soon, and serves on.

Every case has a number; with the seed it says what was sent, in which pieces and whether the client ran away.
"""

import asyncio
from contextlib import suppress
from random import Random
from urllib.parse import urlsplit

from tests.fuzz.arena import Arena
from tests.fuzz.http_answers import answers_in
from tests.fuzz.requests import spoiled_request

SILENT_S = 0.3  # a client that gets nothing for so long says that nothing more will come
HANG_S = 15.0  # longest time of a connection from the first byte to the last
AT_ONCE = 16
CHECK_EVERY = 500


async def shoot(arena: Arena, *, seed: int, seconds: float) -> int:
    """Send cases for `seconds`; how many. AssertionError names seed and case of the first that goes wrong."""
    loop = asyncio.get_running_loop()
    end, numbers = loop.time() + seconds, iter(range(10**9))
    done = 0

    async def run() -> None:
        nonlocal done
        while loop.time() < end:
            await run_case(arena.url, seed, next(numbers))
            done += 1
            if done % CHECK_EVERY == 0:
                await arena.check()

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(run())
    await arena.check()
    return done


async def run_case(url: str, seed: int, number: int) -> None:
    """Send one case and check what comes back."""
    random = Random(f"{seed}/{number}")
    data = spoiled_request(random)
    try:
        async with asyncio.timeout(HANG_S):
            received, has_left = await _exchange(url, data, random)
        if not has_left:
            for answer in answers_in(received, has_bodies=not data.startswith(b"HEAD")):
                answer.check()
    except (AssertionError, TimeoutError, ValueError) as error:
        raise AssertionError(f"seed {seed}, case {number}: {error!r}\nsent {data!r}") from error


async def _exchange(url: str, data: bytes, random: Random) -> tuple[bytes, bool]:
    """What comes back, and whether the client went before it could come."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    leaves = random.random() < 0.1
    received = b""
    try:
        with suppress(ConnectionError):
            for piece in _pieces(data, random):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if leaves:
                writer.transport.abort()
                return b"", True
            received = await _received(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return received, False


def _pieces(data: bytes, random: Random) -> list[bytes]:
    """As a network may cut them."""
    places = sorted(random.randrange(len(data)) for _ in range(random.choice((0, 0, 1, 3))))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


async def _received(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """All bytes until the gateway closes; it is told, when it is silent, that no more requests will come."""
    received, has_ended = b"", False
    with suppress(ConnectionError):
        while True:
            try:
                async with asyncio.timeout(None if has_ended else SILENT_S):
                    piece = await reader.read(65536)
            except TimeoutError:
                has_ended = True
                writer.write_eof()
                continue
            if not piece:
                return received
            received += piece
    return received
