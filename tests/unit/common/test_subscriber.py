"""When silent listeners look at their journals: each once a tick, and never all of them together."""

import asyncio
from pathlib import Path

import pytest

from common import subscriber as module
from common.subscriber import Subscriber, Subscription

pytestmark = pytest.mark.usefixtures("deadline")

NUM_LISTENERS = 200


async def test_silent_listeners_look_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TICK_S", 0.2)
    crowds: list[int] = []  # how many looked in one turn of the loop
    looked: set[Subscription] = set()
    is_done = asyncio.Event()
    look = Subscription.look

    def note(subscription: Subscription) -> None:
        look(subscription)
        if not crowds or crowds[-1] < 0:
            crowds.append(0)
            asyncio.get_running_loop().call_soon(lambda: crowds.append(-1))
        crowds[-1] += 1
        looked.add(subscription)
        if len(looked) == NUM_LISTENERS:
            is_done.set()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pass
        writer.close()

    monkeypatch.setattr(Subscription, "look", note)
    server = await asyncio.start_unix_server(silent, tmp_path / "silent.sock")
    async with Subscriber(f"unix://{tmp_path}/silent.sock") as subscriber:
        for number in range(NUM_LISTENERS):
            subscriber.subscribe(f"channel-{number}")
        await is_done.wait()
    server.close()
    assert 0 < max(crowds) <= NUM_LISTENERS / 5
