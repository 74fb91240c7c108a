"""A program that becomes a command which cannot outlive its parent, however the parent ends, kill -9 included.

    python -I -S leash.py <parent pid> <pipe or -1> <command> ...

`common.child` starts every process through it. It imports nothing of ours and replaces itself by the command, so the
process id stays and starting costs some 20 ms. A process that we fork ourselves calls `ask_for_death_signal` instead.
"""

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
TARGET_CHECK_S = 1.0


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then become the command. Exits with 127 when the command cannot be run."""
    parent, pipe, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    if pipe < 0:
        ask_for_death_signal(parent)
    else:
        _start_watcher(pipe)
    # Python ignores SIGPIPE, and an ignored signal stays ignored in the program that takes our place.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


def ask_for_death_signal(parent: int) -> None:
    """Linux: the kernel kills this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the kernel knew of our wish
        os._exit(1)


def _start_watcher(pipe: int) -> None:
    """Elsewhere: a forked process kills this one when the pipe, whose other end only the parent holds, is closed."""
    target = os.getpid()
    if os.fork():
        os.close(pipe)
        return
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    # We are the target's child: as long as it is our parent, its id belongs to nobody else.
    while os.getppid() == target:
        if select.select([pipe], [], [], TARGET_CHECK_S)[0]:
            if os.getppid() == target:
                os.kill(target, signal.SIGKILL)
            break
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
