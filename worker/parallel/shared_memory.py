"""Memory without a name that a parent shares with its children, by file descriptor.

`multiprocessing.shared_memory` has names, and up to Python 3.12 it removes the name as soon as any
process that opened it ends. What has no name needs no clean-up: the kernel frees it with the last
process, kill -9 or not. It does not count against a container's /dev/shm either.
"""

import mmap
import os
import tempfile


def create_shared_memory(num_bytes: int) -> int:
    """A file descriptor of new memory, all zeros."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tokenfleet-shards")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd


def map_shared_memory(fd: int) -> memoryview:
    """The whole memory behind `fd`, writable; the descriptor may be closed afterwards."""
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
