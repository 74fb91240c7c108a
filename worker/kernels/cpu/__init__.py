"""Our own kernels for CPUs, in C++ that needs no library; compiled when the package is built.

build_backend.py    pip's hook: compiles them for each kind of processor, with a compiler from PyPI
library.py          finds the library that this processor can run, and calls it with tensors
vector.h            sixteen lanes; bfloat16 in memory
parallel.h          items of work on torch's threads
attention.cpp       one query a sequence over the paged cache
elementwise.cpp     norm, rotary positions, gated activation
sampling.cpp        the greedy choice
matrix_product.cpp  bfloat16 products, where AVX512-BF16 is and AMX is not
"""
