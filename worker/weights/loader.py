"""Streams the tensors of safetensors files into a model, several at a time. Knows no families.

    file ──block──► buffer of a thread ──this shard's part──► parameter ──seal──► packed for its kernel

Order is the files' order. A parameter comes into being with its first piece, and a layer whose
parameters are all filled is sealed at once (packed for its kernel, the original freed). So beside
the model, the host holds about one tensor a thread. A shard reads only its own rows of each tensor;
of one that is divided by columns it reads every row, because its part is in every page.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from worker.weights.matching import Delivery, Matching, Target, match
from worker.weights.pieces import Piece, WeightNames
from worker.weights.progress import Progress, silent
from worker.weights.scratch import Scratch
from worker.weights.tensor_file import BlockReader, stored_tensors

# Two keep a disk busy while one of them copies and packs; more than four only take memory.
MIN_THREADS, MAX_THREADS = 2, 4


def load_weights(
    model: nn.Module,
    names: WeightNames,
    files: Sequence[Path],
    device: torch.device,
    *,
    progress: Progress | None = None,
    drops_cache: bool = False,
) -> None:
    """Fill every parameter of `model`, which was built on the meta device. With `drops_cache` the
    files do not stay in the kernel's cache.

    Raises:
        WeightError: tensors are missing, unexpected, of another shape, or stored twice; nothing
            was read then.
        ModelFilesError: a file is damaged.
    """
    progress = progress or silent()
    matching = match(model, names, (tensor for file in files for tensor in stored_tensors(file)))
    num_bytes = sum(delivery.stored.num_bytes for delivery in matching.deliveries)
    filling = _Filling(model, matching, device, progress)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    with progress.stage(f"Loading {count}, {num_bytes / 1e9:.1f} GB"):
        _deliver(filling, matching.deliveries, device, drops_cache=drops_cache)
        for target, source in matching.shared:
            filling.share(target, source)


def _deliver(
    filling: "_Filling", deliveries: Sequence[Delivery], device: torch.device, *, drops_cache: bool
) -> None:
    """Let a few threads fill what each takes next."""
    remaining = iter(deliveries)
    is_over = threading.Event()  # for all, as soon as one fails

    def work() -> None:
        torch.set_num_threads(1)  # the threads here are as many as there should be
        if device.type == "cuda":
            torch.cuda.set_device(device)
        is_pinned = device.type == "cuda"
        with BlockReader(is_pinned=is_pinned, drops_cache=drops_cache) as reader:
            for delivery in remaining:
                if is_over.is_set():
                    return
                filling.fill(delivery, reader)

    num_threads = min(MAX_THREADS, max(MIN_THREADS, torch.get_num_threads()))
    with _kept_num_threads(), ThreadPoolExecutor(num_threads, "loader") as pool:
        workers = [pool.submit(work) for _ in range(num_threads)]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            is_over.set()


@contextmanager
def _kept_num_threads() -> Iterator[None]:
    """torch keeps one number for all threads that are yet to come."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Filling:
    """The state of one load: which parameters exist, and what each layer still waits for."""

    def __init__(
        self, model: nn.Module, matching: Matching, device: torch.device, progress: Progress
    ) -> None:
        self._model = model
        self._device = device
        self._progress = progress
        self._lock = threading.Lock()  # of all that follows, and of the model's attributes
        self._waiting: dict[str, set[Target]] = defaultdict(set)
        self._num_filled: dict[tuple[str, str], int] = defaultdict(int)  # values that files have
        self._scratch = Scratch()
        self._num_bytes = self._num_done_bytes = 0
        for delivery in matching.deliveries:
            target = delivery.target
            self._waiting[target.layer].add(target)
            self._num_filled[target.layer, target.parameter] += delivery.num_values
            self._num_bytes += delivery.stored.num_bytes
        for target, _ in matching.shared:
            self._waiting[target.layer].add(target)

    def fill(self, delivery: Delivery, reader: BlockReader) -> None:
        """Bring a tensor to its parameter. Raises ModelFilesError."""
        if delivery.parts:
            with self._lock:
                parameter = self._parameter(delivery.target)
            for first, last in delivery.row_ranges:
                for start, rows in reader.rows(delivery.stored, first, last):
                    for part in delivery.parts:
                        _copy(rows, start, part, parameter)
        self._close(delivery.target, delivery.stored.num_bytes)

    def share(self, target: Target, source: Target) -> None:
        """Let `target` use the parameter of `source`: the same memory, until a layer packs its own
        copy."""
        shared = getattr(self._model.get_submodule(source.layer), source.parameter)
        setattr(self._model.get_submodule(target.layer), target.parameter, shared)
        self._close(target, 0)

    def _parameter(self, target: Target) -> torch.Tensor:
        module = self._model.get_submodule(target.layer)
        parameter = getattr(module, target.parameter)
        if parameter.is_meta:
            is_passing = hasattr(module, "seal") and parameter.dim() > 1  # a backend may pack it
            if is_passing and self._device.type == "cpu":
                values = self._scratch.empty(parameter.shape, parameter.dtype)
            else:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
            if self._num_filled[target.layer, target.parameter] < values.numel():
                values.zero_()  # a padded vocabulary has rows that no file fills
            parameter = nn.Parameter(values, requires_grad=False)
            setattr(module, target.parameter, parameter)
        return parameter.data

    def _close(self, target: Target, num_bytes: int) -> None:
        with self._lock:
            waiting = self._waiting[target.layer]
            waiting.remove(target)
            is_full = not waiting
            self._num_done_bytes += num_bytes
            self._progress.update(self._num_done_bytes / max(self._num_bytes, 1))
        module = self._model.get_submodule(target.layer)
        if is_full and hasattr(module, "seal"):
            module.seal()


def _copy(rows: torch.Tensor, start: int, part: Piece, parameter: torch.Tensor) -> None:
    """Copy what `part` wants of a file's rows `start` and following."""
    wanted = part.source[0]
    first, last = max(wanted.start, start), min(wanted.stop, start + len(rows))
    if first >= last:
        return
    values = rows[(slice(first - start, last - start), *part.source[1:])]
    axis = 1 if part.is_transposed else 0  # of the parameter, along which the file's rows go
    offset = part.target[axis].start - wanted.start
    target = list(part.target)
    target[axis] = slice(first + offset, last + offset)
    parameter[tuple(target)] = values.T if part.is_transposed else values
