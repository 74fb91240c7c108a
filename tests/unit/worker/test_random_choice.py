"""The kernel that draws tokens, against the torch operations that it stands for."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Sampling
from tests.sampling import CPU, random_logits
from worker.kernels.cpu.choices import random_choice
from worker.sampling import choice, processors
from worker.sampling.choice import Chooser
from worker.sampling.noise import exponential_noise, row_keys, token_table

NEUTRAL = (1.0, 0, 1.0, 1.0, 0.0)
RULES = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"typical_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 1.5, "top_k": 500, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.02},
]


def drawn(logits, rules, monkeypatch, *, by_kernel):
    """A token for every row, with what it was chosen from, in the order of the rows."""
    with monkeypatch.context() as patch:
        if not by_kernel:
            patch.setattr(choice, "random_choice", lambda *_, **__: None)
        choices = Chooser(logits.shape[1], CPU).choose(logits, rules, range(len(rules)))
    found = {}
    for chosen in choices:
        for i, row in enumerate(chosen.rows):
            values = torch.full((logits.shape[1],), -torch.inf)
            if chosen.values is not None:
                at = slice(None) if chosen.ids is None else chosen.ids[i]
                values[at] = chosen.values[i] - chosen.log_total[i]
            found[row] = (int(chosen.tokens[i]), float(chosen.logprobs[i]), values)
    return [found[row] for row in range(len(rules))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("size", [1, 15, 16, 33, 1000, 50_257])
def test_kernel_chooses_what_torch_chooses(size, scale, dtype, monkeypatch):
    rules = [
        Sampling(do_sample=True, seed=seed, top_n_tokens=seed % 2, **rule)
        for seed, rule in enumerate(RULES * 2)
    ]
    logits = random_logits(len(rules), size + 3, scale=scale).to(dtype)[:, :size]
    logits[:, size // 3 :: 3] = -torch.inf  # masked, by a grammar for instance
    logits[:, 0] = 1.0
    ours = drawn(logits, rules, monkeypatch, by_kernel=True)
    torchs = drawn(logits, rules, monkeypatch, by_kernel=False)
    assert [token for token, _, _ in ours] == [token for token, _, _ in torchs]
    for rule, (_, logprob, values), (_, expected, reference) in zip(
        rules, ours, torchs, strict=True
    ):
        assert logprob == pytest.approx(expected, abs=2e-3)
        if rule.top_n_tokens:  # a token at the edge may fall to the other side
            num_others = (values.isfinite() != reference.isfinite()).sum()
            assert num_others <= max(0 if dtype == torch.float32 else 1, size // 2000)
            both = values.isfinite() & reference.isfinite()
            torch.testing.assert_close(values[both], reference[both], atol=2e-3, rtol=0)


@pytest.mark.parametrize("rule", [{"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.2}], ids=str)
def test_equals_are_kept_together(rule):
    logits = torch.tensor([[2.0, 5.0, 4.0, 4.0, 1.0, 4.0, 4.0]])
    numbers = NEUTRAL[0], *({"top_k": 0, "top_p": 1.0, "typical_p": 1.0} | rule).values(), 0.0
    values = choose(logits, numbers, num_draws=1)[1].values[0]
    kept = [1, 2, 3, 5, 6] if "typical_p" not in rule else [2, 3, 5, 6]
    assert values.isfinite().nonzero().flatten().tolist() == kept


@given(
    distances=st.lists(
        st.floats(0, 80, width=32) | st.integers(0, 40).map(float), min_size=1, max_size=70
    ),
    top_k=st.integers(1, 70),
)
def test_top_k_keeps_the_k_nearest_and_their_equals(distances, top_k):
    assert_keeps_nearest(torch.tensor([[0.0, *distances]]), top_k)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_a_limit_is_found_at_the_edges_of_the_search(top_k):
    """It goes on with fewer keys after eight halvings of all numbers."""
    ranges = [(0, 0x7F800000)]
    for _ in range(8):
        halves = [((low, low + (high - low) // 2), high) for low, high in ranges]
        ranges = [half for left, high in halves for half in (left, (left[1] + 1, high))]
    edges = [
        [edge + offset for edge in (low, high) for offset in (-1, 0, 1)]
        for low, high in ranges
        if low > 0x00800000 and high < 0x7F800000
    ]
    assert len(edges) > 200
    distances = torch.from_numpy(np.array(edges, dtype=np.uint32).view(np.float32))
    assert_keeps_nearest(torch.nn.functional.pad(distances, (1, 0)), top_k)


def assert_keeps_nearest(distances, top_k):
    """For rows of distances from the largest logit, which is their first."""
    num_rows, size = distances.shape
    keys = row_keys([5] * num_rows, range(num_rows), CPU)
    rules = torch.tensor([(1.0, top_k, 1.0, 1.0, 0.0)] * num_rows)
    kept = random_choice(-distances, torch.arange(num_rows), rules, keys, has_values=True).values
    limits = distances.sort(dim=-1).values[:, min(top_k, size) - 1]
    assert torch.equal(kept.isfinite(), distances <= limits[:, None])


def choose(logits, numbers, *, num_draws):
    """So many draws from the first row."""
    keys = row_keys([5] * num_draws, range(num_draws), CPU)
    rules = torch.tensor([numbers] * num_draws, dtype=torch.float32)
    rows = torch.zeros(num_draws, dtype=torch.int64)
    return keys, random_choice(logits, rows, rules, keys, has_values=True)


def test_noise_is_that_of_torch():
    """Among equal tokens the smallest noise wins, for every one of many keys."""
    logits = torch.zeros(1, 5000)
    keys, chosen = choose(logits, NEUTRAL, num_draws=500)
    noise = exponential_noise(keys, token_table(5000, CPU))
    smallest = noise.topk(2, largest=False)
    is_clear = smallest.values[:, 0] < smallest.values[:, 1] * (1 - 1e-5)
    assert is_clear.sum() > 490
    assert torch.equal(chosen.tokens[is_clear], smallest.indices[is_clear, 0])


def test_the_smallest_noise_is_half_a_step_above_zero():
    """A token whose hash is 0 beats others by 2**33, and no more."""
    at, other = 17, 18
    table = token_table(100, CPU)
    key = torch.tensor([[int(table[at]) ^ _unmixed(2**31), 1]], dtype=torch.int32)
    noise = exponential_noise(key, table)[0]
    assert noise[at] == pytest.approx(2**-33, rel=1e-6)
    odds = math.log(noise[other] / noise[at])
    for more, winner in ((-0.01, other), (0.01, at)):
        logits = torch.full((1, 100), -torch.inf)
        logits[0, other], logits[0, at] = odds + 1.0, 1.0 + more
        chosen = random_choice(
            logits,
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([NEUTRAL]),
            key,
            has_values=False,
        )
        assert chosen.tokens.tolist() == [winner]


def _unmixed(word):
    """The inverse of MurmurHash3's finaliser, as an int32."""
    word ^= word >> 16
    word = word * pow(0xC2B2AE35, -1, 2**32) % 2**32
    word ^= (word >> 13) ^ (word >> 26)
    word = word * pow(0x85EBCA6B, -1, 2**32) % 2**32
    word ^= word >> 16
    return word - 2**32 if word >= 2**31 else word


def test_rows_are_drawn_alike_on_any_number_of_threads():
    logits = random_logits(8, 4000)
    rules = torch.tensor([(0.9, 50, 0.9, 1.0, 0.0), NEUTRAL] * 4)
    keys, rows = row_keys(range(8), range(8), CPU), torch.arange(8).flip(0)
    before = torch.get_num_threads()
    try:
        found = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            found.append(random_choice(logits, rows, rules, keys, has_values=True))
    finally:
        torch.set_num_threads(before)
    for name in ("tokens", "logprobs", "log_totals", "values"):
        assert torch.equal(*(getattr(chosen, name) for chosen in found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_broken_logits_are_not_a_number(dtype):
    logits = torch.randn(4, 100).to(dtype)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = -torch.inf  # one that is only masked
    every = [NEUTRAL, (1.0, 5, 0.9, 0.9, 0.1)]
    for rules, has_values in itertools.product(every, [False, True]):
        numbers, keys = torch.tensor([rules] * 4), row_keys([1] * 4, range(4), CPU)
        chosen = random_choice(logits, torch.arange(4), numbers, keys, has_values=has_values)
        assert chosen.logprobs.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("size", [1, 15, 31, 64, 100, 50_257])
@pytest.mark.parametrize("num_words", [1, 2, 1571])
def test_tokens_that_a_grammar_does_not_allow(size, num_words, monkeypatch):
    logits = random_logits(5, size + 3)
    bits = torch.randint(-(2**31), 2**31 - 1, (3, num_words), dtype=torch.int32)
    rows = torch.tensor([4, 0, 2])
    expected = logits.clone()
    with monkeypatch.context() as patch:
        patch.setattr(processors, "keep_tokens_", lambda *_: False)
        processors.keep_grammatical_(expected[:, :size], rows, bits)
    processors.keep_grammatical_(logits[:, :size], rows, bits)
    assert torch.equal(logits, expected)
    assert logits[[1, 3]].isfinite().all()
