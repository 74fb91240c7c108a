"""The sampler in tests: one with a sequence in every slot, and logits for it."""

import torch

from common.messages import Sampling
from worker.engine.plan import SequenceStart
from worker.sampling.sampler import Sampler

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
