// The two halves of a pre-normalised block around its attention: RMSNorm, rotary positions, a gated
// MLP with silu, bfloat16. One call each instead of eleven: between small kernels the second thread
// waits for Python.
#include <stdint.h>
#include <string.h>

#include "vector.h"

#ifdef __AVX512BF16__

extern "C" {
void rms_norm_bfloat16(bfloat16 *, const bfloat16 *, const bfloat16 *, int64_t, int64_t, int64_t,
                       float, int64_t);
void rotate_bfloat16(bfloat16 *, const bfloat16 *, const bfloat16 *, int64_t, int64_t, int64_t,
                     int64_t, int64_t, int64_t);
void silu_gated_bfloat16(bfloat16 *, const bfloat16 *, int64_t, int64_t, int64_t);
void add_bfloat16(bfloat16 *, const bfloat16 *, int64_t, int64_t);
void matrix_product(bfloat16 *, const uint32_t *, const uint32_t *, const bfloat16 *, int64_t,
                    int64_t, int64_t, int64_t, int64_t);
}

namespace {

// A packed weight [N, K], and a bias [N] or null.
struct Product {
    const uint32_t *packed;
    const bfloat16 *bias;
    int64_t num_outputs, num_inputs;

    void operator()(bfloat16 *out, const bfloat16 *x, int64_t num_rows, int64_t num_threads) const {
        matrix_product(out, reinterpret_cast<const uint32_t *>(x), packed, bias, num_rows,
                       num_inputs / 2, num_outputs, num_inputs / 2, num_threads);
    }
};

struct Norm {
    const bfloat16 *weight; // null: there is none
    double eps;

    void operator()(bfloat16 *out, const bfloat16 *x, int64_t num_rows, int64_t size,
                    int64_t num_threads) const {
        rms_norm_bfloat16(out, x, weight, num_rows, size, size, (float)eps, num_threads);
    }
};

} // namespace

// As `GatedBlock` in gated_block.py lays it out.
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
                                       int64_t num_rows, int64_t num_threads) {
    const int64_t dim = block->head_dim, num_rotated = block->num_heads + block->num_kv_heads;
    const int64_t stride = block->qkv.num_outputs, size = 2 * block->num_kv_heads * dim;
    block->attention_norm(scratch, x, num_rows, block->qkv.num_inputs, num_threads);
    block->qkv(heads, scratch, num_rows, num_threads);
    for (int64_t t = 0; block->q_norm.weight && t < num_rows; t++) {
        bfloat16 *queries = heads + t * stride, *keys = queries + block->num_heads * dim;
        block->q_norm(queries, queries, block->num_heads, dim, num_threads);
        block->k_norm(keys, keys, block->num_kv_heads, dim, num_threads);
    }
    rotate_bfloat16(heads, cos, sin, num_rows, num_rotated, dim, stride, dim, num_threads);
    for (int64_t t = 0; t < num_rows; t++)
        memcpy(cache + cache_rows[t] * size, heads + t * stride + block->num_heads * dim,
               size * sizeof(bfloat16));
}

// x [T, hidden] and what its queries attended to, [T, num_heads * head_dim], to `out` [T, hidden].
// `scratch` [T, 2 * hidden + 3 * intermediate].
extern "C" void block_after_attention(const Block *block, bfloat16 *out, const bfloat16 *x,
                                      const bfloat16 *attended, bfloat16 *scratch, int64_t num_rows,
                                      int64_t num_threads) {
    const int64_t hidden = block->down.num_outputs, size = num_rows * hidden;
    bfloat16 *normed = scratch, *middle = normed + size, *gate_up = middle + size;
    bfloat16 *activated = gate_up + num_rows * block->gate_up.num_outputs;
    block->output(middle, attended, num_rows, num_threads);
    add_bfloat16(middle, x, size, num_threads);
    block->mlp_norm(normed, middle, num_rows, hidden, num_threads);
    block->gate_up(gate_up, normed, num_rows, num_threads);
    silu_gated_bfloat16(activated, gate_up, num_rows, block->down.num_inputs, num_threads);
    block->down(out, activated, num_rows, num_threads);
    add_bfloat16(out, middle, size, num_threads);
}
#endif
