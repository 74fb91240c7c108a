"""What the processes of one group share on a machine, as file descriptors: the launcher makes it,
each shard takes its end.

    shared memory    beats of all shards | plan ring
    listener         a bound socket, for rank 0: where the group meets
    doorbells        one pipe for each shard above zero; rank 0 rings
"""

import os
import socket
from dataclasses import dataclass

from worker.parallel.beats import BeatBoard, Beats, board_bytes
from worker.parallel.doorbell import Doorbell
from worker.parallel.plan_ring import RingReader, RingWriter, ring_bytes
from worker.parallel.shared_memory import create_shared_memory, map_shared_memory
from worker.settings import WorkerSettings

NO_FD = -1


class GroupWiring:
    """The launcher's side: everything exists from the start, so shards find it whenever they come."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Raises OSError if the master address cannot be listened on."""
        self._settings = settings
        self._num_local = num_local = settings.num_local_shards
        self._memory_fd = create_shared_memory(board_bytes(num_local) + ring_bytes(num_local - 1))
        self._memory = map_shared_memory(self._memory_fd)
        self._bells = [Doorbell.create() for _ in range(1, num_local)]
        self._listener = _listen(settings) if settings.node_rank == 0 else None
        self.board = BeatBoard(self._memory, num_local)

    def options(self, local_rank: int) -> dict[str, object]:
        """The settings by which a shard finds its place."""
        settings, listener = self._settings, self._listener
        port = listener.getsockname()[1] if listener else settings.master_port
        return {
            "shard_rank": settings.node_rank * self._num_local + local_rank,
            "shard_fds": self.fds(local_rank),
            "master_port": port,
        }

    def fds(self, local_rank: int) -> tuple[int, ...]:
        """What this shard gets; `ShardWiring` reads them in this order."""
        if self._settings.node_rank or local_rank:
            bells = [self._bells[local_rank - 1].reading] if local_rank else []
            return (self._memory_fd, *bells)
        listener = self._listener
        return (self._memory_fd, listener.fileno(), *(bell.writing for bell in self._bells))

    def close(self) -> None:
        """All shards are started and hold their own."""
        os.close(self._memory_fd)
        for bell in self._bells:
            bell.close()
        if self._listener:
            self._listener.close()


@dataclass(frozen=True, slots=True)
class ShardWiring:
    """One shard's end."""

    rank: int
    local_rank: int
    num_local: int
    memory: memoryview
    listener: socket.socket | None
    bells: tuple[Doorbell, ...]

    @classmethod
    def of(cls, settings: WorkerSettings) -> "ShardWiring":
        """What the launcher passed to this process."""
        rank, num_local = settings.shard_rank, settings.num_local_shards
        assert rank is not None, "a shard is started by the launcher"
        memory_fd, *rest = settings.shard_fds
        listener = socket.socket(fileno=rest.pop(0)) if rank == 0 else None
        bells = [Doorbell(writing=fd) if rank == 0 else Doorbell(reading=fd) for fd in rest]
        memory = map_shared_memory(memory_fd)
        return cls(rank, rank % num_local, num_local, memory, listener, tuple(bells))

    def beats(self) -> Beats:
        return Beats(self.memory, self.local_rank)

    def writer(self) -> RingWriter:
        """Of rank 0."""
        return RingWriter(self._ring, self.bells)

    def reader(self) -> RingReader:
        """Of the others."""
        (bell,) = self.bells
        reader, num_readers = self.local_rank - 1, self.num_local - 1
        return RingReader(self._ring, bell, reader=reader, num_readers=num_readers)

    @property
    def _ring(self) -> memoryview:
        return self.memory[board_bytes(self.num_local) :]


def _listen(settings: WorkerSettings) -> socket.socket:
    """Bound here and handed on, so that nobody takes a free port between our looking and using it."""
    address = (settings.master_addr, settings.master_port or 0)
    family, kind, _, _, resolved = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(resolved)
    listener.listen()
    return listener
