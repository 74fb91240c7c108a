"""The likeliest tokens that an answer shows beside the chosen one."""

import math

import pytest
import torch

from worker.sampling.top_tokens import top_tokens


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [0]),
        (2, [0, 3]),
        (3, [0, 3, 1, 4]),
        (4, [0, 3, 1, 4]),
        (5, [0, 3, 1, 4, 2]),
        (9, [0, 3, 1, 4, 2]),
    ],
)
def test_top_tokens_come_with_ties(count, expected):
    values = torch.tensor([[-1.0, -3.0, -4.0, -2.0, -3.0]])
    top = top_tokens(values, torch.zeros(1), [count])[0]
    assert [token for token, _ in top] == expected
    assert [p for _, p in top] == [values[0, token].item() for token in expected]


def test_top_tokens_of_rows_that_want_different_numbers():
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, -math.inf]])
    tops = top_tokens(values, torch.zeros(3), [0, 1, 3])
    assert [[token for token, _ in top] for top in tops] == [[], [0], [0, 1]]
