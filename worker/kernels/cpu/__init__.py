"""Our own kernels for CPUs, in C++ that needs no library; compiled when the package is built.

build_backend.py      pip's hook: compiles them for each kind of processor, with a compiler from PyPI
library.py            finds the library that this processor can run, and calls it with tensors
choices.py            the choice of tokens, called with tensors
products.py           products with packed weights, called with tensors
gated_block.py        all of a block but its attention, in two calls
gated_decoder.py      all layers of a step that only decodes, in one
vector.h              sixteen lanes; bfloat16 in memory
parallel.h, .cpp      items of work on a pool of threads
panels.h              bfloat16 products of rows with packed weights
matrix_product.h, .cpp  the same for whole weights, and what follows them in a block
gated_block.h, .cpp   a block: norms, products, rotary positions, the cache's new rows
gated_decoder.cpp     its layers one after the other, with their attention
softmax.h             softmax over tiles of scores
attention.cpp         one query a sequence over the paged cache
attention_tile.h      what that does with some keys and values
prompt_attention.cpp  many queries of one sequence, in bfloat16
elementwise.cpp       norm, rotary positions, gated activation, sum
greedy_choice.cpp     the likeliest token
random_choice.cpp     a random one, of those that the sampling rules keep
top_tokens.cpp        the likeliest tokens
token_mask.cpp        what a grammar does not allow
logits.h              rows of logits, in lanes
shortlist.h           what a sampling rule keeps, found without sorting
noise.h               random numbers, as worker/sampling/noise.py defines them
int8_product.cpp      products with weights and activations in 8 bits
"""
