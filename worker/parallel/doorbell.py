"""Wakes one sleeping process: a pipe with a bell in it. Sleeping at it costs nothing."""

import os
import select
from dataclasses import dataclass

_BELL = b"!"
_MAX_BELLS = 4096


@dataclass(frozen=True, slots=True)
class Doorbell:
    """One end, or both, of a pipe. Bells are not counted: who wakes up looks for himself."""

    reading: int = -1
    writing: int = -1

    @classmethod
    def create(cls) -> "Doorbell":
        return cls(*os.pipe())

    def ring(self) -> None:
        """Wake who sleeps, or let the next sleep end at once."""
        os.write(self.writing, _BELL)

    def sleep(self, timeout_s: float) -> None:
        """Until the bell rings, `timeout_s` at most."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            os.read(self.reading, _MAX_BELLS)

    def close(self) -> None:
        for fd in (self.reading, self.writing):
            if fd >= 0:
                os.close(fd)
