"""Memory that is used again as soon as nobody uses it: for weights that only wait to be packed.

Fresh memory comes from the kernel page by page, which takes longer than to read the weights that go
there. Knows no weights.
"""

import math
import weakref

import numpy as np
import torch

_ALIGNMENT = 64  # a cache line


class Scratch:
    """Hands out tensors. When the last view of one is gone, its memory is for the next; when this
    object is gone, so is all that is free."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with anything in it. Not for two threads at once."""
        num_bytes = math.prod(shape) * dtype.itemsize
        sizes = [block.nbytes for block in self._free]
        # No more than twice what is needed: it may be kept for ever.
        fitting = [i for i, size in enumerate(sizes) if num_bytes <= size <= 2 * num_bytes]
        if fitting:
            block = self._free.pop(min(fitting, key=sizes.__getitem__))
        else:
            block = _aligned(num_bytes)
        # torch holds on to this array, and to no other, as long as a tensor lies in it.
        view = block[:num_bytes]
        weakref.finalize(view, _give_back, weakref.ref(self), block).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)


def _give_back(owner: "weakref.ref[Scratch]", block: np.ndarray) -> None:
    scratch = owner()
    if scratch is not None:
        scratch._free.append(block)


def _aligned(num_bytes: int) -> np.ndarray:
    raw = np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + num_bytes]
