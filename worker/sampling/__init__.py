"""From logits to tokens. Knows tensors and sampling values; neither models, text nor Redis.

noise.py       random numbers as a function of (seed, position, token), without any state
processors.py  one batched function a rule, in the order in which the rules apply
history.py     which tokens a sequence has seen, kept for its penalties only
entries.py     single entries of the logits, collected for one rule
top_tokens.py  the likeliest tokens of a row, ties included
sampler.py     greedy and seeded choice for a batch, with log-probabilities
"""
