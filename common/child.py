"""A child process in a session of its own that ends when we end. Knows nothing of what it runs.

Its own session, because Ctrl-C reaches a whole foreground process group: the supervisor alone must hear it, so that the
broker is still there while gateway and worker drain. Its own process group, so that its children end with it.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

POLL_S = 0.05


class Child:
    """One started process; it is started by making the object."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: IO[bytes] | None = None,
        pass_fds: Sequence[int] = (),
        defaults: Mapping[str, str] | None = None,
        has_death_signal: bool = sys.platform == "linux",
    ) -> None:
        """Start `command`.

        Args:
            output: receives standard output and error; without it the child writes where we write.
            pass_fds: our file descriptors that the child gets too, under the same numbers.
            defaults: environment of the child, where ours does not say otherwise.
            has_death_signal: the kernel can end a child whose parent is gone; otherwise a small watcher process does.
        """
        # Linux sends the death signal when the *thread* that forked ends, so that must be the one that lives longest.
        assert not has_death_signal or threading.current_thread() is threading.main_thread()
        self._is_swept = False
        leash = Path(__file__).with_name("leash.py").resolve()
        reading, self._pipe = (-1, -1) if has_death_signal else os.pipe()
        start = [sys.executable, "-I", "-S", str(leash), str(os.getpid()), str(reading)]
        try:
            self._process = subprocess.Popen(
                [*start, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(*pass_fds,) if reading < 0 else (*pass_fds, reading),
                # handed on, reads no setting
                env={**(defaults or {}), **os.environ},
            )
        finally:
            if reading >= 0:
                os.close(reading)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        code = self._process.poll()
        if code is not None and not self._is_swept:
            self._is_swept = True
            self._end_group()
            if self._pipe >= 0:
                os.close(self._pipe)
        return code

    async def exited(self) -> int:
        """Wait for the end and return the exit code. Polls: that needs neither threads nor a certain event loop."""
        while (code := self.exit_code) is None:
            await asyncio.sleep(POLL_S)
        return code

    def wait(self, timeout_s: float | None = None) -> int:
        """Block until the end and return the exit code. Raises TimeoutError."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"process {self.pid} still runs after {timeout_s} s") from error
        code = self.exit_code
        assert code is not None
        return code

    def terminate(self) -> None:
        """Ask it to end (SIGTERM); it may take its time."""
        self._process.terminate()

    def kill(self) -> None:
        """End it and its own children at once (SIGKILL to its process group)."""
        if self.exit_code is None:
            self._end_group()

    def _end_group(self) -> None:
        """Also when the child itself has ended: what it left behind would hold its port or its GPU."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def describe_exit(code: int) -> str:
    """An exit code in words: `exit code 3`, or `SIGKILL` with the usual reason for it."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps because memory ran out" if name == "SIGKILL" else name
