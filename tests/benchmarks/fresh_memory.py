"""How long the machine takes to give memory that nobody has touched: no load can be faster.

On a virtual machine it can be the slowest part by far, because the host has to find each page.
"""

import ctypes
import mmap
import time
from concurrent.futures import ThreadPoolExecutor


def fresh_memory_s(num_bytes: int, num_threads: int) -> float:
    """Seconds until so many threads have written to `num_bytes` of new memory. It is freed again."""
    started_at = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        shares = list(pool.map(_touched, [num_bytes // num_threads] * num_threads))
    taken_s = time.perf_counter() - started_at
    for share in shares:
        share.close()
    return taken_s


def _touched(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes)
    first = ctypes.c_char.from_buffer(memory)
    ctypes.memset(ctypes.addressof(first), 1, num_bytes)  # without the interpreter's lock
    del first  # else the memory cannot be closed
    return memory
