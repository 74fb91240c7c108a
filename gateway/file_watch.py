"""Notices that files changed: keys and certificates are replaced while a gateway serves."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

LOOK_S = 1.0


async def watch(paths: Sequence[str], call: Callable[[], None]) -> None:
    """Call `call` whenever one of the files is another one than before, for ever."""
    seen = _marks(paths)
    while True:
        await asyncio.sleep(LOOK_S)
        now = _marks(paths)
        if now != seen:
            seen = now
            call()


def _marks(paths: Sequence[str]) -> list[tuple[int, ...] | None]:
    """What tells files apart, also those behind the links that Kubernetes turns round."""
    return [_mark(Path(path).expanduser()) for path in paths]


def _mark(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
