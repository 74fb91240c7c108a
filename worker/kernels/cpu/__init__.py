"""Our own kernels for CPUs, in C++ that needs no library; compiled when the package is built.

build_backend.py      pip's hook: compiles them for each kind of processor, with a compiler from PyPI
library.py            finds the library that this processor can run, and calls it with tensors
products.py           products with packed weights, called with tensors
gated_block.py        all of a block but its attention, in two calls
vector.h              sixteen lanes; bfloat16 in memory
parallel.h, .cpp      items of work on a pool of threads
panels.h              bfloat16 products of rows with packed weights
gated_block.cpp       the same: norms, products, rotary positions, the cache's new rows
softmax.h             softmax over tiles of scores
attention.cpp         one query a sequence over the paged cache
attention_tile.h      what that does with some keys and values
prompt_attention.cpp  many queries of one sequence, in bfloat16
elementwise.cpp       norm, rotary positions, gated activation, sum
sampling.cpp          the greedy choice
matrix_product.cpp    bfloat16 products, where AVX512-BF16 is and AMX is not
int8_product.cpp      the same with weights and activations in 8 bits
"""
