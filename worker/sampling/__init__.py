"""From logits to tokens. Knows tensors and sampling values; neither models, text nor Redis.

noise.py        random numbers as a function of (seed, position, token), without any state
processors.py   one batched function a rule, in the order in which the rules apply
state.py        what is kept of the sequence in a slot
history.py      which tokens a sequence has seen, kept for its penalties only
watermark.py    which tokens a watermark favours
grammar.py      structured output: which tokens may come next, worked out in other threads
grammar_budget.py  the processor time that a row's grammar may take
token_bytes.py  a SentencePiece tokenizer as the grammar library reads it
entries.py      single entries of the logits, collected for one rule
adjust.py       the rules that change single logits, for the rows that ask for them
top_tokens.py   the likeliest tokens of a row, ties included
choice.py       the rules that shorten the list of tokens, and the greedy or random choice
sampler.py      all of it for the slots of a batch, with log-probabilities
"""
