"""Weight files stay in the kernel's cache only where there is room for them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worker.engine import memory
from worker.engine.memory import has_room_for_file_cache
from worker.weights import tensor_file
from worker.weights.tensor_file import BlockReader, stored_tensors


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the kernel is told: offset, length and advice."""
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *advice: told.append(advice))
    return told


def read_all(file: Path, *, drops_cache: bool) -> torch.Tensor:
    [tensor] = stored_tensors(file)
    with BlockReader(is_pinned=False, drops_cache=drops_cache) as reader:
        return torch.cat([rows.clone() for _, rows in reader.rows(tensor, 0, tensor.shape[0])])


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 100)
    monkeypatch.setattr(tensor_file, "_LARGEST_FOLIO_BYTES", 10)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(200).view(50, 4).float()}, path)
    return path


def test_what_was_read_is_dropped_block_by_block(
    file: Path, advice: list[tuple[int, int, int]]
) -> None:
    values = read_all(file, drops_cache=True)
    assert torch.equal(values, torch.arange(200).view(50, 4).float())
    [tensor] = stored_tensors(file)
    assert [length for _, length, _ in advice] == [106] * 8 + [42], "and what reaches into it"
    assert [offset for offset, *_ in advice] == [tensor.offset + 96 * i - 10 for i in range(9)]
    assert {what for *_, what in advice} == {os.POSIX_FADV_DONTNEED}


def test_what_was_read_stays(file: Path, advice: list[tuple[int, int, int]]) -> None:
    read_all(file, drops_cache=False)
    assert not advice


def test_there_is_room_for_a_quarter_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 4000)
    files = [tmp_path / "one", tmp_path / "two"]
    for path, num_bytes in zip(files, (600, 400), strict=True):
        path.write_bytes(bytes(num_bytes))
    assert has_room_for_file_cache(files)
    files[1].write_bytes(bytes(401))
    assert not has_room_for_file_cache(files)
