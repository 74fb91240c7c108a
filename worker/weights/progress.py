"""What takes how long, told to people: one line that is rewritten on a terminal, plain lines
anywhere else."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TOLD_EVERY_S = 10.0  # where lines cannot be rewritten


class Progress:
    """Tells the stages of some work, one after the other."""

    def __init__(self, say: Callable[[str], None], *, is_terminal: bool) -> None:
        self._say = say
        self._is_terminal = is_terminal
        self._stage = ""
        self._shown_percent = -1
        self._started = 0.0
        self._told = 0.0

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Something that takes a while; tells its time when it is done."""
        self._stage, self._shown_percent = text, -1
        self._started = self._told = time.monotonic()
        self._say(f"{text} ..." if self._is_terminal else f"{text}\n")
        try:
            yield
        except BaseException:
            self._say("\n" if self._is_terminal else "")
            raise
        done = f"{text}: done in {time.monotonic() - self._started:.1f} s\n"
        self._say(f"\r\x1b[K{done}" if self._is_terminal else done)

    def update(self, fraction: float) -> None:
        """How much of the stage is done, 0 to 1."""
        percent, now = int(fraction * 100), time.monotonic()
        if percent == self._shown_percent:
            return
        if self._is_terminal:
            self._say(f"\r\x1b[K{self._stage} {percent} %{self._rest(fraction, now)}")
        elif now - self._told >= _TOLD_EVERY_S:
            self._told = now
            self._say(f"{self._stage}: {percent} %{self._rest(fraction, now)}\n")
        else:
            return
        self._shown_percent = percent

    def tick(self) -> None:
        """The stage goes on; nobody knows for how long."""
        if self._is_terminal:
            self._say(f"\r\x1b[K{self._stage} {time.monotonic() - self._started:.0f} s")

    def note(self, text: str) -> None:
        """Something worth a line of its own, between stages."""
        self._say(f"{text}\n")

    def _rest(self, fraction: float, now: float) -> str:
        passed = now - self._started
        if fraction <= 0 or passed < 2:
            return ""
        return f", {passed / fraction - passed:.0f} s left"


def silent() -> Progress:
    """Shows nothing."""
    return Progress(lambda text: None, is_terminal=False)


def on_stderr() -> Progress:
    """For commands: what they print on standard output is their result."""

    def say(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    return Progress(say, is_terminal=sys.stderr.isatty())


def in_log(log: logging.Logger) -> Progress:
    """For services: a line that is rewritten on a terminal, lines of the log anywhere else."""
    if sys.stderr.isatty():
        return on_stderr()
    return Progress(lambda text: log.info("%s", text.rstrip()) if text else None, is_terminal=False)
