"""Plans from rank 0 to shards on other machines, over gloo. Where all shards are on one machine, the
ring is eight times as fast (`plan_ring.py`).

    first broadcast    | length, 8 bytes | the message, or its beginning |   4 KiB: most plans
    second broadcast   | the rest |                                          only if there is one
"""

import torch
import torch.distributed as dist

HEAD_BYTES = 4096
_LENGTH_BYTES = 8
_ROOM = HEAD_BYTES - _LENGTH_BYTES


class PlanBroadcast:
    """Both sides: rank 0 calls `send`, and all others `receive`, equally often."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def send(self, message: bytes) -> None:
        head = len(message).to_bytes(_LENGTH_BYTES, "little") + message[:_ROOM]
        self._broadcast(bytearray(head.ljust(HEAD_BYTES, b"\0")))
        if len(message) > _ROOM:
            self._broadcast(bytearray(message[_ROOM:]))

    def receive(self) -> bytes:
        """Wait for the next message. Raises RuntimeError when rank 0 is gone."""
        head = self._broadcast(bytearray(HEAD_BYTES))
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        message = bytes(head[_LENGTH_BYTES : _LENGTH_BYTES + length])
        if length > _ROOM:
            message += self._broadcast(bytearray(length - _ROOM))
        return message

    def _broadcast(self, data: bytearray) -> bytearray:
        """Send `data` if we are rank 0, else fill it."""
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), src=0, group=self._group)
        return data
