"""Layers of the models. Each knows its shard's sizes and how its weights are cut; none knows a family.

build.py         what every layer is told when it is made
linear.py        column, row, merged and QKV parallel linears; how a matrix product is run
embedding.py     vocabulary-parallel embedding and head; learned positions
norm.py          RMSNorm and LayerNorm
residual.py      the residual stream
rotary.py        rotary position embedding and its scaled forms
alibi.py         positions as a bias on attention scores
bucketed_bias.py positions as a learned bias on attention scores, by distance
activations.py   activation functions, plain and gated
feed_forward.py  the two-layer feed-forward network
attention.py     attention over the paged KV cache
"""
