// The two halves of a block around its attention, in one call each instead of eleven: between small
// kernels the second thread waits for Python.
#include "gated_block.h"

#ifdef __AVX512BF16__

extern "C" {
void rms_norm_bfloat16(bfloat16 *, const bfloat16 *, const bfloat16 *, int64_t, int64_t, int64_t,
                       float, int64_t);
void rotate_bfloat16(bfloat16 *, const bfloat16 *, const bfloat16 *, int64_t, int64_t, int64_t,
                     int64_t, int64_t, int64_t);
void silu_gated_bfloat16(bfloat16 *, const bfloat16 *, int64_t, int64_t, int64_t);
}

namespace {

void normalize(bfloat16 *out, const bfloat16 *x, const Norm &norm, int64_t num_rows, int64_t size,
               int64_t num_threads) {
    rms_norm_bfloat16(out, x, norm.weight, num_rows, size, size, (float)norm.eps, num_threads);
}

// silu(gate) * up of x [T, hidden] to `activated` [T, intermediate], and T * 2 * intermediate more
// for sizes whose gates and what they let through do not lie in panels of their own.
void multiply_activated(bfloat16 *activated, const bfloat16 *x, const Block &block,
                        int64_t num_rows, int64_t num_threads) {
    const int64_t size = block.down.num_inputs;
    if (size % (2 * LANES) == 0) {
        multiply_gated(activated, x, block.gate_up, num_rows, num_threads);
        return;
    }
    bfloat16 *gate_up = activated + num_rows * size;
    multiply_rows(gate_up, x, block.gate_up, nullptr, num_rows, num_threads);
    silu_gated_bfloat16(activated, gate_up, num_rows, size, num_threads);
}

} // namespace

extern "C" void block_before_attention(const Block *block, bfloat16 *heads, const bfloat16 *x,
                                       const bfloat16 *cos, const bfloat16 *sin, bfloat16 *cache,
                                       const int64_t *cache_rows, bfloat16 *scratch,
                                       int64_t num_rows, int64_t num_threads) {
    const int64_t dim = block->head_dim, num_rotated = block->num_heads + block->num_kv_heads;
    const int64_t stride = block->qkv.num_outputs, size = 2 * block->num_kv_heads * dim;
    normalize(scratch, x, block->attention_norm, num_rows, block->qkv.num_inputs, num_threads);
    multiply_rows(heads, scratch, block->qkv, nullptr, num_rows, num_threads);
    for (int64_t t = 0; block->q_norm.weight && t < num_rows; t++) {
        bfloat16 *queries = heads + t * stride, *keys = queries + block->num_heads * dim;
        normalize(queries, queries, block->q_norm, block->num_heads, dim, num_threads);
        normalize(keys, keys, block->k_norm, block->num_kv_heads, dim, num_threads);
    }
    rotate_bfloat16(heads, cos, sin, num_rows, num_rotated, dim, stride, dim, num_threads);
    for (int64_t t = 0; t < num_rows; t++)
        memcpy(cache + cache_rows[t] * size, heads + t * stride + block->num_heads * dim,
               size * sizeof(bfloat16));
}

extern "C" void block_after_attention(const Block *block, bfloat16 *out, const bfloat16 *x,
                                      const bfloat16 *attended, bfloat16 *scratch, int64_t num_rows,
                                      int64_t num_threads) {
    const int64_t hidden = block->down.num_outputs, size = num_rows * hidden;
    bfloat16 *normed = scratch, *middle = normed + size, *activated = middle + size;
    multiply_rows(middle, attended, block->output, x, num_rows, num_threads);
    normalize(normed, middle, block->mlp_norm, num_rows, hidden, num_threads);
    multiply_activated(activated, normed, *block, num_rows, num_threads);
    multiply_rows(out, activated, block->down, middle, num_rows, num_threads);
}
#endif
