"""The likeliest tokens of a row: by the kernel, by torch's operations, and as clients see them."""

import pytest
import torch

from tests.sampling import random_logits
from worker.kernels.cpu.choices import likeliest_tokens
from worker.sampling import top_tokens as module
from worker.sampling.top_tokens import likeliest_by_torch, top_tokens


def lists(found):
    return [(tokens.tolist(), logits.tolist()) for tokens, logits in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 16, 33, 1000, 50_257])
def test_kernel_finds_what_torch_finds(size, dtype):
    logits = random_logits(7, size + 5).to(dtype)[:, :size]  # of bfloat16 many are equal
    logits[:, size // 2 :: 2] = -torch.inf
    logits[:, 0] = 0.5
    logits[3] = 1.0  # all of them
    rows, wanted = torch.tensor([6, 0, 3, 2, 4]), torch.tensor([5, 1, 2, 20, 2000])
    found = lists(likeliest_tokens(logits, rows, wanted))
    assert found == lists(likeliest_by_torch(logits, rows, wanted, None))
    assert len(found[2][0]) == size


@pytest.mark.parametrize("way", ["kernel", "torch"])
def test_equals_of_the_last_come_too_and_dropped_ones_never(way, monkeypatch):
    if way == "torch":
        monkeypatch.setattr(module, "likeliest_tokens", lambda *_: None)
    values = torch.tensor([[1.0, 3.0, -torch.inf, 2.0, 2.0], [0.0, -torch.inf, -1.0, -2.0, -3.0]])
    total = torch.tensor([10.0, 5.0])
    assert top_tokens(values, total, [2, 0]) == [((1, -7.0), (3, -8.0), (4, -8.0)), ()]
    assert top_tokens(values, total, [0, 9])[1] == ((0, -5.0), (2, -6.0), (3, -7.0), (4, -8.0))


def test_values_of_some_tokens_have_these_tokens_ids():
    values, ids = torch.tensor([[0.0, -1.0, -torch.inf]]), torch.tensor([[40, 7, 8]])
    assert top_tokens(values, torch.zeros(1), [3], ids) == [((40, 0.0), (7, -1.0))]


def test_rows_of_no_number_have_no_likeliest_tokens():
    logits = torch.full((2, 100), torch.nan)
    logits[1] = -torch.inf
    found = likeliest_tokens(logits, torch.arange(2), torch.tensor([3, 3]))
    assert [len(tokens) for tokens, _ in found] == [0, 0]
