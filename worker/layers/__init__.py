"""Layers of the models. Each knows its shard's sizes and how its weights are cut; none knows a family.

build.py        what every layer is told when it is made
linear.py       column, row, merged and QKV parallel linears; how a matrix product is run
embedding.py    vocabulary-parallel embedding and head
norm.py         RMSNorm
rotary.py       rotary position embedding and its scaled forms
activations.py  gated activations
attention.py    attention over the paged KV cache
"""
