"""The watermark: found in marked text by its z-score, absent elsewhere, and only in rows that ask."""

import math

import pytest
import torch

from common.messages import Sampling
from worker.engine.plan import SequenceStart
from worker.sampling.sampler import Sampler
from worker.sampling.watermark import HASH_KEY, Watermark

VOCAB = 500
PROMPT = (5, 6)


def generate(sampling, count, *, watermark=None, prompt=PROMPT, output=()):
    """Tokens over logits that are random, but the same for every sampling."""
    sampler = Sampler(1, VOCAB, eos_tokens=(2,), device="cpu", watermark=watermark)
    sampler.start(SequenceStart(0, prompt, tuple(output), sampling))
    tokens = list(output)
    while len(tokens) < count:
        generator = torch.Generator().manual_seed(len(tokens))
        logits = torch.randn(1, VOCAB, generator=generator) * 2
        tokens.append(sampler.sample(logits, [0], [len(prompt) + len(tokens)])[0].token)
    return tokens


def z_score(tokens, *, gamma=0.5, vocab=VOCAB, prompt=PROMPT):
    """Kirchenbauer et al. 2023, equation 3, from the definition alone: no code of ours."""
    num_green = 0
    for previous, token in zip((prompt[-1], *tokens), tokens, strict=False):
        generator = torch.Generator().manual_seed(15485863 * previous)
        green = torch.randperm(vocab, generator=generator)[: int(gamma * vocab)]
        num_green += bool((green == token).any())
    return (num_green - gamma * len(tokens)) / math.sqrt(len(tokens) * gamma * (1 - gamma))


@pytest.mark.parametrize("do_sample", [False, True])
def test_detector_finds_it(do_sample):
    plain = Sampling(do_sample=do_sample, seed=3)
    marked = Sampling(do_sample=do_sample, seed=3, watermark=True)
    assert abs(z_score(generate(plain, 200))) < 3
    assert z_score(generate(marked, 200)) > 6


def test_gamma_and_delta():
    settings = Watermark(VOCAB, gamma=0.25, delta=6.0)
    tokens = generate(Sampling(watermark=True), 200, watermark=settings)
    assert z_score(tokens, gamma=0.25) > 15
    silent = Watermark(VOCAB, delta=0.0)
    assert generate(Sampling(watermark=True), 50, watermark=silent) == generate(Sampling(), 50)


def test_only_green_logits_rise_by_delta():
    """Before the temperature, and seeded by the last token of the prompt."""
    sampler = Sampler(1, VOCAB, eos_tokens=(2,), device="cpu")
    sampling = Sampling(watermark=True, top_n_tokens=VOCAB)
    sampler.start(SequenceStart(0, PROMPT, (), sampling))
    top = dict(sampler.sample(torch.zeros(1, VOCAB), [0], [2])[0].top)
    green = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(HASH_KEY * PROMPT[-1]))
    green = set(green[: VOCAB // 2].tolist())
    levels = {token in green: logprob for token, logprob in top.items()}
    assert levels[True] - levels[False] == pytest.approx(2.0, abs=1e-5)
    assert all(logprob == pytest.approx(levels[t in green], abs=1e-5) for t, logprob in top.items())


def test_neighbours_are_not_marked():
    rows = [Sampling(), Sampling(watermark=True), Sampling(do_sample=True, seed=9)]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(3, VOCAB, eos_tokens=(2,), device="cpu")
    for slot, sampling in enumerate(rows):
        sampler.start(SequenceStart(slot, PROMPT, (), sampling))
    together = sampler.sample(logits.clone(), [0, 1, 2], [2, 2, 2])
    for slot in (0, 2):
        alone = Sampler(1, VOCAB, eos_tokens=(2,), device="cpu")
        alone.start(SequenceStart(0, PROMPT, (), rows[slot]))
        (chosen,) = alone.sample(logits[slot : slot + 1].clone(), [0], [2])
        assert (chosen.token, chosen.logprob) == (together[slot].token, together[slot].logprob)


def test_it_goes_on_after_a_preemption():
    marked = Sampling(do_sample=True, seed=3, watermark=True)
    tokens = generate(marked, 30)
    assert generate(marked, 30, output=tokens[:11]) == tokens


def test_lists_that_were_forgotten_are_drawn_again():
    watermark = Watermark(20)
    first = watermark.green(0).clone()
    for token in range(1, 1200):
        watermark.green(token)
    assert watermark.green(0).equal(first)
    assert int(first.sum()) == 10
