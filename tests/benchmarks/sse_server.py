"""A tiny server of token streams with exactly known timing, against which the load generator tests
itself.

Time is virtual: the server moves the clock, writes, and goes on once the client has read the clock,
which it does when bytes arrive. So every latency is exact, nothing sleeps, and two writes never
arrive as one.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web


class VirtualClock:
    """A `Clock` that stands still until someone moves it. One stream at a time may wait on it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._was_read = asyncio.Event()

    def now(self) -> float:
        self._was_read.set()
        return self._now

    async def sleep_until(self, when: float) -> None:
        self._now = max(self._now, when)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        self._now += seconds
        self._was_read.clear()

    async def read(self) -> None:
        """Wait until someone has looked at the clock since it last moved."""
        await self._was_read.wait()


@dataclass(frozen=True, slots=True)
class Script:
    """What the server does with one request: each piece of bytes, after how many seconds."""

    pieces: Sequence[tuple[float, bytes]] = ()
    status: int = 200
    is_cut: bool = False  # drop the connection after the last piece


@asynccontextmanager
async def scripted_server(
    choose: Callable[[dict], Script], clock: VirtualClock | None = None
) -> AsyncIterator[str]:
    """Serve every POST with the script that `choose` picks for its JSON body; yields the base
    address.
    """

    async def answer(request: web.Request) -> web.StreamResponse:
        script = choose(await request.json())
        headers = {
            "content-type": "text/event-stream" if script.status == 200 else "application/json"
        }
        response = web.StreamResponse(status=script.status, headers=headers)
        await response.prepare(request)
        for delay_s, piece in script.pieces:
            if clock:
                clock.advance(delay_s)
            await response.write(piece)
            if clock and script.status == 200:
                await clock.read()
        if script.is_cut:
            request.transport.abort()
        return response

    application = web.Application()
    application.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def tgi_events(num_tokens: int) -> list[bytes]:
    """The events of `/generate_stream` for an answer of `num_tokens` tokens."""
    events = []
    for index in range(1, num_tokens + 1):
        event = {
            "index": index,
            "token": {"id": index, "text": " é", "logprob": -0.5, "special": False},
        }
        event |= {"generated_text": None, "details": None}
        if index == num_tokens:
            details = {"finish_reason": "length", "generated_tokens": num_tokens, "input_length": 7}
            event |= {"generated_text": " é" * num_tokens, "details": details}
        events.append(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
    return events


def in_pieces(
    events: Sequence[bytes], gaps_s: Sequence[float], size: int
) -> list[tuple[float, bytes]]:
    """The events cut into pieces of `size` bytes; an event's gap passes before its last piece."""
    pieces = []
    for event, gap_s in zip(events, gaps_s, strict=True):
        cuts = [event[start : start + size] for start in range(0, len(event), size)]
        pieces += [(0.0, cut) for cut in cuts[:-1]] + [(gap_s, cuts[-1])]
    return pieces
