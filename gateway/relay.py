"""Frames of a stream to its client's events: at once while the client keeps up, else when it has read."""

from collections.abc import Callable

from common.messages import Frame
from gateway.generation import FrameStream
from gateway.resumption import EventId
from gateway.sse import EventStream


async def relay(
    frames: FrameStream,
    events: EventStream,
    format: Callable[[int, Frame], bytes],
    *,
    last_event: EventId | None = None,
) -> None:
    """Write what `format` makes of every frame behind `last_event`, until the stream ends or is stopped.

    Earlier frames are formatted too, for what they leave behind, but not written again. Raises what the iteration
    over `frames` raises, and ConnectionError when the client is gone.
    """
    first = last_event.index + 1 if last_event else 0

    def unseen(index: int, frame: Frame) -> bytes:
        text = format(index, frame)
        return text if index >= first else b""

    make = unseen if first else format

    def send_ready() -> None:
        if events.can_send:
            text = b"".join([make(index, frame) for index, frame in frames.ready()])
            if text:
                events.send(text)

    frames.listen(send_ready)
    async for item in frames:
        async with events.turn:
            texts = [make(index, frame) for index, frame in (item, *frames.ready())]
            if text := b"".join(texts):
                await events.write(text)
