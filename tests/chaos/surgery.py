"""Makes a running process see another time, or a slower disk, by writing other machine code over two of its functions.

Needs no privilege (a process may write into its own children), no compiler and no preloaded library, and it works on a
broker, a gateway and a worker alike: all of them ask the kernel's vDSO for the time, and libc for a sync. x86-64 Linux.
"""

import os
import platform
import signal
import struct
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

_IS_STOPPED_AFTER_S = 2.0
_LONGEST_CODE = 64


def shift_clock(pid: int, seconds: int) -> None:
    """Let wall clocks of process `pid` tell the kernel's time plus `seconds`; its monotonic clocks go on as they are.

    Each function becomes: the system call of the same name, then an addition to the seconds of what it gave.
    """
    by = struct.pack("<i", seconds)
    add_at_rdi, add_at_rsi, ret = b"\x48\x81\x07" + by, b"\x48\x81\x06" + by, b"\xc3"
    is_realtime = (
        b"\x85\xff\x74\x05\x83\xff\x05\x75\x07"  # edi is 0 or 5 (coarse), else skip the addition
    )
    _replace(
        pid,
        "[vdso]",
        {
            "__vdso_gettimeofday": _system_call(96) + b"\x48\x85\xff\x74\x07" + add_at_rdi + ret,
            "__vdso_clock_gettime": _system_call(228) + is_realtime + add_at_rsi + ret,
            "__vdso_time": _system_call(201) + b"\x48\x05" + by + ret,
        },
    )


def slow_down_sync(pid: int, seconds: float) -> None:
    """Let `fdatasync` of process `pid` take `seconds`, and do nothing."""
    whole, rest = divmod(int(seconds * 1e9), 1_000_000_000)
    code = (
        b"\x48\x83\xec\x10"  # room for a timespec on the stack
        + (b"\x48\xc7\x04\x24" + struct.pack("<i", whole))
        + (b"\x48\xc7\x44\x24\x08" + struct.pack("<i", rest))
        + b"\x48\x89\xe7\x31\xf6"  # nanosleep(it, NULL)
        + _system_call(35)
        + b"\x48\x83\xc4\x10\x31\xc0\xc3"  # return 0
    )
    _replace(pid, "libc.so.6", {"fdatasync": code})


def _system_call(number: int) -> bytes:
    return b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"


def _replace(pid: int, library: str, functions: Mapping[str, bytes]) -> None:
    """Write `functions` over those of a library, while no thread is inside one of them."""
    if platform.machine() != "x86_64":
        raise NotImplementedError(f"the code is that of x86-64. This machine: {platform.machine()}")
    base, image = _image(pid, library)
    places = {base + _symbols(image)[name]: code for name, code in functions.items()}
    with _stopped(pid, outside=list(places)), open(f"/proc/{pid}/mem", "r+b", buffering=0) as mem:
        for place, code in places.items():
            mem.seek(place)
            mem.write(code)


def _image(pid: int, library: str) -> tuple[int, bytes]:
    """Where a library begins in a process, and its file's content."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(library):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if library != "[vdso]":
                return first, Path(line.split()[-1]).read_bytes()
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
                mem.seek(first)
                return first, mem.read(last - first)
    raise LookupError(f"process {pid} has no {library}")


def _symbols(image: bytes) -> dict[str, int]:
    """Addresses in an ELF64 image's table of dynamic symbols, relative to its beginning."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * size) for i in range(count)]
    found = {}
    for section in sections:
        if section[1] == 11:  # SHT_DYNSYM
            names = sections[section[6]][4]
            for at in range(section[4], section[4] + section[5], 24):
                name, _, _, index, value = struct.unpack_from("<IBBHQ", image, at)
                start = names + name
                if index:
                    found[image[start : image.index(b"\0", start)].decode()] = value
    return found


@contextmanager
def _stopped(pid: int, *, outside: list[int]):
    """Stop a process at a moment when none of its threads is in the code at these places."""
    give_up_at = time.monotonic() + _IS_STOPPED_AFTER_S
    while True:
        os.kill(pid, signal.SIGSTOP)
        try:
            places = _program_counters(pid)
            is_busy = any(at <= place < at + _LONGEST_CODE for place in places for at in outside)
            if places and not is_busy:
                yield
                return
        finally:
            os.kill(pid, signal.SIGCONT)
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"process {pid} is always inside the code that is to be replaced")
        time.sleep(0.003)


def _program_counters(pid: int) -> list[int]:
    """Of all threads; empty while one still runs."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        words = (thread / "syscall").read_text().split()
        if words[0] == "running":
            return []
        found.append(int(words[-1], 16))
    return found
