// A pre-normalised block: RMSNorm, rotary positions, a gated MLP with silu, bfloat16.
#pragma once

#include "matrix_product.h"

#ifdef __AVX512BF16__

struct Norm {
    const bfloat16 *weight; // null: there is none
    double eps;
};

// As gated_block.py lays it out.
struct Block {
    Norm attention_norm, mlp_norm, q_norm, k_norm; // the last two of each head
    Product qkv, output, gate_up, down;
    int64_t num_heads, num_kv_heads, head_dim;
};

// x [T, hidden] to `heads` [T, num_heads + 2 * num_kv_heads, head_dim]: queries, keys, values. Keys
// and values go to the cache as well: of token t to row `cache_rows[t]`. `scratch` [T, hidden].
extern "C" void block_before_attention(const Block *block, bfloat16 *heads, const bfloat16 *x,
                                       const bfloat16 *cos, const bfloat16 *sin, bfloat16 *cache,
                                       const int64_t *cache_rows, bfloat16 *scratch,
                                       int64_t num_rows, int64_t num_threads);

// x [T, hidden] and what its queries attended to, [T, num_heads * head_dim], to `out` [T, hidden].
// `scratch` [T, 2 * hidden + 3 * intermediate].
extern "C" void block_after_attention(const Block *block, bfloat16 *out, const bfloat16 *x,
                                      const bfloat16 *attended, bfloat16 *scratch, int64_t num_rows,
                                      int64_t num_threads);
#endif
