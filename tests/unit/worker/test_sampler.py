"""The sampler: distribution, reproducibility, log-probabilities.

And rows that must not disturb one another.
"""

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
from worker.engine.plan import NO_TOKEN, SequenceStart
from worker.sampling.history import TokenHistory
from worker.sampling.noise import exponential_noise, row_keys, token_table
from worker.sampling.sampler import Sampler
from worker.sampling.top_tokens import top_tokens

CPU = torch.device("cpu")
EOS = 2


def sampler_with(*samplings: Sampling, vocab=64, prompt=(5, 6), output=(), min_new_tokens=0):
    sampler = Sampler(len(samplings), vocab, eos_tokens=(EOS,), device=CPU)
    for slot, sampling in enumerate(samplings):
        sampler.start(SequenceStart(slot, prompt, output, sampling, min_new_tokens))
    return sampler


def choose(logits, *samplings, position=2, **start):
    sampler = sampler_with(*samplings, vocab=logits.shape[-1], **start)
    rows = range(len(samplings))
    return sampler.sample(logits.clone(), rows, [position] * len(samplings))


def random_logits(rows, vocab, *, scale=3.0, seed=3):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


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


# noise


def test_hash_is_murmur3_in_exact_integer_arithmetic():
    """Recomputed with Python integers: what any device must give."""

    def fmix32(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    def fmix64(h):
        h = ((h ^ (h >> 33)) * 0xFF51AFD7ED558CCD) % 2**64
        h = ((h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53) % 2**64
        return h ^ (h >> 33)

    tokens = [0, 1, 2, 17, 49151]
    for seed in (0, 1, 2**63, 2**64 - 1):
        for position in (0, 1, 131072):
            key = fmix64(seed ^ fmix64(position + 1))
            keys = row_keys([seed], [position], CPU)
            noise = exponential_noise(keys, token_table(49152, CPU)[tokens])[0]
            for token, value in zip(tokens, noise.tolist(), strict=True):
                h = fmix32(((fmix32(token) ^ (key >> 32)) * (key % 2**32 | 1)) % 2**32)
                uniform = np.float32(((h ^ 2**31) + 0.5) / 2**32)
                assert value == pytest.approx(-math.log1p(-float(uniform)), rel=1e-6)


def test_uniform_numbers_stay_inside_the_interval():
    """For every hash, the two extremes too."""
    every = exponential_noise(row_keys(range(200), [1] * 200, CPU), token_table(49152, CPU))
    assert every.min() > 0
    assert every.isfinite().all()

    def unfmix32(h):
        h ^= h >> 16
        h = h * pow(0xC2B2AE35, -1, 2**32) % 2**32
        h ^= (h >> 13) ^ (h >> 26)
        h = h * pow(0x85EBCA6B, -1, 2**32) % 2**32
        return h ^ (h >> 16)

    entries = np.array([[unfmix32(2**31), unfmix32(2**31 - 1)]], dtype=np.uint32).view(np.int32)
    neutral_key = torch.tensor([[0, 1]], dtype=torch.int32)
    smallest, largest = exponential_noise(neutral_key, torch.from_numpy(entries))[0].tolist()
    assert smallest == pytest.approx(0.5 / 2**32, rel=1e-6)
    assert largest == pytest.approx(24 * math.log(2), rel=1e-6)


def test_noise_of_neighbours_is_uncorrelated():
    keys = row_keys([11] * 400, range(400), CPU)
    noise = exponential_noise(keys, token_table(1000, CPU)).double()
    by_position = torch.corrcoef(torch.stack((noise[:-1].flatten(), noise[1:].flatten())))[0, 1]
    by_token = torch.corrcoef(torch.stack((noise[:, :-1].flatten(), noise[:, 1:].flatten())))[0, 1]
    by_seed = exponential_noise(
        row_keys([12] * 400, range(400), CPU), token_table(1000, CPU)
    ).double()
    by_seed = torch.corrcoef(torch.stack((noise.flatten(), by_seed.flatten())))[0, 1]
    assert max(abs(by_position), abs(by_token), abs(by_seed)) < 5 / math.sqrt(399_000)
    assert float(noise.mean()) == pytest.approx(1, abs=0.01)


# choice


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


def test_a_token_does_not_depend_on_its_batch():
    kinds = [
        Sampling(),
        Sampling(do_sample=True, seed=5),
        Sampling(do_sample=True, seed=5, temperature=0.7, top_p=0.9),
        Sampling(do_sample=True, seed=6, top_k=50, repetition_penalty=1.3),
        Sampling(do_sample=True, seed=7, typical_p=0.8),
        Sampling(do_sample=True, seed=8, min_p=0.02, frequency_penalty=0.5),
        Sampling(do_sample=True, seed=9, top_p=0.9999, temperature=2.0),
    ]
    logits = random_logits(len(kinds), 1999)
    together = choose(logits, *kinds)
    alone = [choose(logits[i : i + 1], kind)[0] for i, kind in enumerate(kinds)]
    assert [s.token for s in alone] == [s.token for s in together]
    assert [s.logprob for s in alone] == pytest.approx([s.logprob for s in together], abs=1e-6)
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = choose(logits[order], *(kinds[i] for i in order))
    assert [s.token for s in shuffled] == [together[i].token for i in order]


def test_filters_do_not_change_the_noise_of_what_they_keep():
    """A rule that drops nothing leaves the choice alone, although another code path makes it."""
    logits = random_logits(40, 700)
    plain = choose(logits, *(Sampling(do_sample=True, seed=i) for i in range(40)))
    kept = choose(logits, *(Sampling(do_sample=True, seed=i, top_k=700) for i in range(40)))
    assert [s.token for s in plain] == [s.token for s in kept]


def test_seeds_are_unsigned_64_bit_and_all_differ():
    logits = torch.zeros(1, 5000)
    seeds = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    tokens = [choose(logits, Sampling(do_sample=True, seed=seed))[0].token for seed in seeds]
    assert len(set(tokens)) == len(seeds)


def test_position_counts_not_the_number_of_calls():
    logits = random_logits(1, 500)
    sampler = sampler_with(Sampling(do_sample=True, seed=3), vocab=500)
    first = [sampler.sample(logits.clone(), [0], [p])[0].token for p in range(2, 22)]
    again = [sampler.sample(logits.clone(), [0], [p])[0].token for p in range(2, 22)]
    assert first == again
    assert len(set(first)) > 5


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    logits = random_logits(2, 3000)
    best = logits.argmax(-1).tolist()
    rules = [
        Sampling(do_sample=True, seed=1, top_k=1),
        Sampling(do_sample=True, seed=2, top_p=1e-9),
    ]
    chosen = choose(logits, *rules)
    assert [s.token for s in chosen] == best
    assert [s.logprob for s in chosen] == pytest.approx([0.0, 0.0], abs=1e-6)


# rules that the sampler feeds with its own state


def test_greedy_takes_the_best_and_tells_its_raw_logprob():
    logits = random_logits(2, 100)
    for row, sampled in enumerate(choose(logits, Sampling(), Sampling())):
        assert sampled.token == int(logits[row].argmax())
        assert sampled.logprob == pytest.approx(float(logits[row].log_softmax(-1).max()), abs=1e-5)


def test_bfloat16_logits_are_judged_in_float32():
    logits = random_logits(1, 100).bfloat16()
    sampled = choose(logits, Sampling())[0]
    assert sampled.logprob == pytest.approx(float(logits.float().log_softmax(-1).max()), abs=1e-5)


def test_penalties_see_prompt_earlier_output_and_new_tokens():
    """Greedy with a strong repetition penalty walks through distinct tokens.

    None of them seen before.
    """
    logits = torch.arange(30, 0, -1.0).view(1, 30)
    rules = Sampling(repetition_penalty=100.0)
    sampler = sampler_with(rules, vocab=30, prompt=(0, 1), output=(2,))
    walk = [sampler.sample(logits.clone(), [0], [p])[0].token for p in range(3, 8)]
    assert walk == [3, 4, 5, 6, 7]


def test_frequency_penalty_counts_generated_tokens_only():
    logits = torch.tensor([[3.0, 2.1, 0.0, 0.0]])
    sampler = sampler_with(Sampling(frequency_penalty=0.5), vocab=4, prompt=(0, 0, 0), output=())
    walk = [sampler.sample(logits.clone(), [0], [p])[0].token for p in range(3, 8)]
    assert walk == [0, 0, 1, 0, 1]


def test_presence_penalty_is_paid_once():
    logits = torch.tensor([[3.0, 2.1, 0.0, 0.0]])
    sampler = sampler_with(Sampling(presence_penalty=1.0), vocab=4, prompt=(0,), output=(0,))
    walk = [sampler.sample(logits.clone(), [0], [p])[0].token for p in range(2, 6)]
    assert walk == [1, 0, 0, 0]


def test_a_restarted_sequence_continues_as_if_it_had_never_moved():
    logits = random_logits(1, 200, scale=1.0)
    rules = Sampling(do_sample=True, seed=8, repetition_penalty=1.5, frequency_penalty=0.4)
    stayed = sampler_with(rules, vocab=200)
    walk = [stayed.sample(logits.clone(), [0], [2 + i])[0].token for i in range(30)]
    moved = sampler_with(rules, vocab=200, output=tuple(walk[:12]))
    rest = [moved.sample(logits.clone(), [0], [2 + i])[0].token for i in range(12, 30)]
    assert rest == walk[12:]


def test_logit_bias_forces_and_forbids():
    logits = random_logits(1, 50)
    best = int(logits.argmax())
    assert choose(logits, Sampling(logit_bias=((7, 100.0),)))[0].token == 7
    assert choose(logits, Sampling(logit_bias=((best, -100.0),)))[0].token != best


def test_end_of_sequence_waits_for_min_new_tokens():
    logits = torch.zeros(1, 10)
    logits[0, EOS] = 9.0
    sampler = sampler_with(Sampling(), vocab=10, prompt=(1, 1, 1), min_new_tokens=2)
    walk = [sampler.sample(logits.clone(), [0], [p])[0].token for p in (3, 4, 5)]
    assert walk[0] != EOS
    assert walk[1] != EOS
    assert walk[2] == EOS


# top tokens


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


# broken logits


@pytest.mark.parametrize(
    "broken", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "nothing left"]
)
@pytest.mark.parametrize(
    "rules",
    [
        Sampling(top_n_tokens=2),
        Sampling(do_sample=True, seed=1),
        Sampling(
            do_sample=True, seed=1, top_k=9, top_p=0.5, typical_p=0.9, min_p=0.1, top_n_tokens=2
        ),
    ],
    ids=["greedy", "free", "filtered"],
)
def test_a_broken_row_fails_alone(broken, rules):
    logits = random_logits(3, 400)
    sound = choose(logits, rules, rules, rules)
    if broken == -math.inf:
        logits[1] = broken
    else:
        logits[1, 77] = broken
    chosen = choose(logits, rules, rules, rules)
    assert chosen[1].token == NO_TOKEN
    assert math.isnan(chosen[1].logprob)
    assert chosen[1].top == ()
    assert [chosen[0], chosen[2]] == [sound[0], sound[2]]


def test_history_grows_past_its_room():
    history = TokenHistory((3, 3, 4), (4,))
    for token in range(100):
        history.record(token)
    counts = dict(zip(history.tokens.tolist(), history.counts.tolist(), strict=True))
    assert len(counts) == 100
    assert counts[3] == 1
    assert counts[4] == 2
