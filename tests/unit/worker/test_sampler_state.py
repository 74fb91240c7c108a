"""Rules that the sampler feeds with its own state: penalties, bias, the end of a sequence."""

import torch

from common.messages import Sampling
from tests.sampling import EOS, choose, random_logits, sampler_with
from worker.sampling.history import TokenHistory


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


def test_history_grows_past_its_room():
    history = TokenHistory((3, 3, 4), (4,))
    for token in range(100):
        history.record(token)
    counts = dict(zip(history.tokens.tolist(), history.counts.tolist(), strict=True))
    assert len(counts) == 100
    assert counts[3] == 1
    assert counts[4] == 2
