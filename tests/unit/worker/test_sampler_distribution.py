"""What the sampler draws is distributed as transformers' rules say."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from common.messages import Sampling
from tests.sampling import choose, random_logits, sampler_with

pytestmark = pytest.mark.usefixtures("drawing")


def draws(logits, sampling, count):
    """How often each token is chosen at `count` consecutive positions of one request."""
    sampler = sampler_with(sampling, vocab=logits.shape[-1])
    tallies = [0] * logits.shape[-1]
    for first in range(2, count + 2, 500):
        batch = logits.expand(500, -1).clone()
        for chosen in sampler.sample(batch, [0] * 500, range(first, first + 500)):
            tallies[chosen.token] += 1
    return torch.tensor(tallies, dtype=torch.float64)


def chi_square(observed, probability):
    """The statistic's distance from its mean in standard deviations.

    Over tokens that are expected often enough.
    """
    expected = probability.double() * observed.sum()
    frequent = expected >= 5
    observed = torch.cat((observed[frequent], observed[~frequent].sum().view(1)))
    expected = torch.cat((expected[frequent], expected[~frequent].sum().view(1)))
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


def reference_scores(logits, sampling, tokens=(5, 6)):
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.typical_p < 1:
        warpers.append(TypicalLogitsWarper(sampling.typical_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(torch.tensor([tokens] * len(logits)), logits.clone())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(do_sample=True, seed=1),
        Sampling(do_sample=True, seed=2, temperature=0.5),
        Sampling(do_sample=True, seed=3, top_k=12),
        Sampling(do_sample=True, seed=4, top_p=0.8),
        Sampling(do_sample=True, seed=5, typical_p=0.7),
        Sampling(do_sample=True, seed=6, min_p=0.05),
        Sampling(
            do_sample=True,
            seed=2**64 - 1,
            temperature=1.7,
            top_k=40,
            top_p=0.9,
            typical_p=0.95,
            min_p=0.01,
        ),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "typical_p", "min_p", "all"],
)
def test_samples_follow_the_softmax_after_all_rules(sampling):
    logits = random_logits(1, 64, scale=2.0)
    probability = reference_scores(logits, sampling)[0].softmax(-1)
    observed = draws(logits, sampling, 20_000)
    assert observed[probability == 0].sum() == 0
    assert abs(chi_square(observed, probability)) < 4.5


def test_a_large_vocabulary_is_sampled_without_bias():
    """Among 49152 equal tokens the winner's noise is tiny.

    Coarse random numbers would prefer low tokens.
    """
    sampler = sampler_with(Sampling(do_sample=True, seed=9), vocab=49152)
    tokens = []
    for first in range(2, 2002, 100):
        chosen = sampler.sample(torch.zeros(100, 49152), [0] * 100, range(first, first + 100))
        tokens += [sampled.token for sampled in chosen]
    thirds = torch.tensor(tokens).div(49152 / 8).long().bincount(minlength=8).double()
    assert abs(chi_square(thirds, torch.full((8,), 1 / 8))) < 4.5
    assert float(np.mean(tokens)) == pytest.approx(49152 / 2, rel=0.05)


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(
    "rules",
    [
        {"top_k": 5},
        {"top_k": 256},
        {"top_k": 3000},
        {"top_k": 10**6, "top_p": 0.3},
        {"top_p": 0.6},
        {"top_p": 0.99},
        {"top_k": 100, "top_p": 0.5},
        {"min_p": 0.2},
        {"typical_p": 0.5},
        {"top_p": 0.9, "typical_p": 0.5, "min_p": 0.1},
        {"temperature": 0.3, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_candidates_give_the_same_as_the_whole_vocabulary(rules, scale):
    """Few candidates, many, or all: what is kept is what transformers keeps of everything.

    The tolerance is a token or two of thousands: where float32 sums are cut depends on their order.
    """
    logits = random_logits(3, 6000, scale=scale)
    sampling = Sampling(do_sample=True, seed=21, top_n_tokens=8, **rules)
    expected = reference_scores(logits, sampling).log_softmax(-1)
    for row, sampled in enumerate(choose(logits, *[sampling] * 3)):
        assert sampled.logprob == pytest.approx(expected[row, sampled.token].item(), abs=1e-3)
        if sampling.typical_p < 1 and scale < 1:
            continue  # nearly equal tokens: rounding decides which of them are at the edge
        kept = min(8, int(expected[row].isfinite().sum()))
        best = expected[row].topk(kept)
        assert [token for token, _ in sampled.top] == best.indices.tolist()
        assert [p for _, p in sampled.top] == pytest.approx(best.values.tolist(), abs=1e-3)
