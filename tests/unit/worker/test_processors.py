"""Each sampling rule against transformers' own, or against its definition in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from worker.sampling import processors

VOCAB = 307


def random_logits(rows: int = 5, *, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(7)) * scale


def descending(logits: torch.Tensor) -> torch.Tensor:
    return logits.sort(dim=-1, descending=True).values


def test_logit_bias_is_added_to_the_named_entries_only():
    logits = random_logits(2)
    expected = logits.clone()
    expected[0, 3] += 5.0
    expected[1, 3] -= 100.0
    processors.add_logit_bias_(
        logits, torch.tensor([0, 1]), torch.tensor([3, 3]), torch.tensor([5.0, -100.0])
    )
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits = random_logits(2)
    seen = [[1, 5, 9], [0, 5, 300]]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), logits.clone())
    processors.penalize_repetition_(
        logits,
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor(seen[0] + seen[1]),
        torch.full((6,), penalty),
    )
    torch.testing.assert_close(logits, expected)


def test_frequency_and_presence_follow_openai_arithmetic():
    logits = random_logits(1)
    expected = logits.clone()
    expected[0, 4] -= 0.5 * 3 + 0.25
    expected[0, 8] -= 0.5 * 1 + 0.25  # 6 was only in the prompt: count 0
    processors.penalize_frequency_and_presence_(
        logits,
        torch.tensor([0, 0, 0]),
        torch.tensor([4, 6, 8]),
        torch.tensor([3.0, 0.0, 1.0]),
        frequency=torch.full((3,), 0.5),
        presence=torch.full((3,), 0.25),
    )
    torch.testing.assert_close(logits, expected)


def test_masked_tokens_have_no_probability():
    logits = random_logits(2)
    processors.mask_tokens_(logits, torch.tensor([1, 1]), torch.tensor([0, 2]))
    assert logits.isneginf().nonzero().tolist() == [[1, 0], [1, 2]]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.5])
def test_temperature_is_that_of_transformers_up_to_a_constant(temperature):
    logits = random_logits()
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    actual = processors.apply_temperature(logits, torch.full((5,), temperature))
    torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1))


def test_no_temperature_overflows():
    values = processors.apply_temperature(random_logits(1), torch.tensor([1e-42]))
    assert values.max() == 0
    assert not values.isnan().any()


@pytest.mark.parametrize("top_k", [1, 2, 50, VOCAB, VOCAB + 5, 2**31 - 1])
def test_top_k_is_that_of_transformers(top_k):
    logits = descending(random_logits())
    expected = TopKLogitsWarper(top_k)(None, logits)
    torch.testing.assert_close(processors.keep_top_k(logits, torch.full((5,), top_k)), expected)


def test_top_k_keeps_what_equals_the_last_one():
    logits = torch.tensor([[4.0, 3.0, 3.0, 3.0, 1.0]])
    kept = processors.keep_top_k(logits, torch.tensor([2])).isfinite()
    assert kept.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(top_p):
    logits = descending(random_logits())
    expected = TopPLogitsWarper(top_p)(None, logits)
    actual = processors.keep_top_p(logits, torch.full((5,), top_p), logits.logsumexp(-1))
    torch.testing.assert_close(actual, expected)
    assert actual.isfinite().any(-1).all()


@pytest.mark.parametrize("mass", [0.05, 0.4, 0.95])
@pytest.mark.parametrize("top_k", [0, 20])
def test_typical_p_is_that_of_transformers(mass, top_k):
    logits = processors.keep_top_k(descending(random_logits()), torch.full((5,), top_k))
    expected = TypicalLogitsWarper(mass)(None, logits)
    torch.testing.assert_close(processors.keep_typical(logits, torch.full((5,), mass)), expected)


@pytest.mark.parametrize("min_p", [1e-6, 0.03, 0.5, 1.0])
def test_min_p_is_that_of_transformers(min_p):
    logits = random_logits()
    expected = MinPLogitsWarper(min_p)(None, logits)
    torch.testing.assert_close(processors.keep_min_p(logits, torch.full((5,), min_p)), expected)


def test_neutral_values_change_nothing():
    logits = descending(random_logits())
    off, one = torch.zeros(5), torch.ones(5)
    assert processors.keep_top_k(logits, torch.zeros(5, dtype=torch.int64)).equal(logits)
    assert processors.keep_top_p(logits, one, logits.logsumexp(-1)).equal(logits)
    assert processors.keep_typical(logits, one).equal(logits)
    assert processors.keep_min_p(logits, off).equal(logits)


def test_each_row_follows_its_own_value():
    logits = descending(random_logits(3))
    kept = processors.keep_top_k(logits, torch.tensor([1, 0, 7])).isfinite().sum(-1)
    assert kept.tolist() == [1, VOCAB, 7]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
)
def test_nucleus_is_the_smallest_set_that_reaches_p(quarters, top_p):
    logits = descending(torch.tensor([[q / 4 for q in quarters]]))
    kept = processors.keep_top_p(logits, torch.tensor([top_p]), logits.logsumexp(-1))
    probability = logits.double().softmax(-1)[0]
    size = int(kept.isfinite().sum())
    assert float(probability[:size].sum()) >= top_p - 1e-5
    smaller = [i for i in range(size) if logits[0, i] > logits[0, size - 1]]  # ties stay together
    assert math.fsum(probability[smaller].tolist()) < top_p + 1e-5
