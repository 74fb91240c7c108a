"""The sampler's choice: reproducible, with its log-probability, and undisturbed by other rows."""

import math
from dataclasses import replace

import pytest
import torch

from common.messages import Sampling
from tests.sampling import choose, random_logits, sampler_with
from worker.engine.plan import NO_TOKEN

pytestmark = pytest.mark.usefixtures("drawing")


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


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    logits = random_logits(2, 3000)
    rules = Sampling(do_sample=True, seed=1, temperature=temperature)
    chosen = choose(logits, rules, replace(rules, top_p=0.9))
    assert [s.token for s in chosen] == logits.argmax(-1).tolist()
    assert [s.logprob for s in chosen] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_greedy_takes_the_best_and_tells_its_raw_logprob():
    logits = random_logits(2, 100)
    for row, sampled in enumerate(choose(logits, Sampling(), Sampling())):
        assert sampled.token == int(logits[row].argmax())
        assert sampled.logprob == pytest.approx(float(logits[row].log_softmax(-1).max()), abs=1e-5)


def test_bfloat16_logits_are_judged_in_float32():
    logits = random_logits(1, 100).bfloat16()
    sampled = choose(logits, Sampling())[0]
    assert sampled.logprob == pytest.approx(float(logits.float().log_softmax(-1).max()), abs=1e-5)


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
