"""Folders that are made once and appear complete or not at all, whatever is killed meanwhile."""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def made_once(target: Path, make: Callable[[Path], Path]) -> Path:
    """The folder `target`. If it is missing, `make` gets an empty folder beside it and returns the
    finished one inside, or that itself, which then becomes `target`.

    Who comes while another process is making it waits for that one.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / f".{target.name}.lock"):
        if target.is_dir():  # made while we waited
            return target
        partial = target.parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of somebody who was killed
        partial.mkdir()
        try:
            make(partial).rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time. The lock is released by the kernel when its holder dies."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
