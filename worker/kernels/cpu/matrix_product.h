// Products of rows with packed weights, and what follows them in a block. See panels.h for how a
// weight is packed.
#pragma once

#include "vector.h"

// A packed weight [N, K], and a bias [N] or null.
struct Product {
    const uint32_t *packed;
    const bfloat16 *bias;
    int64_t num_outputs, num_inputs;
};

// out [T, N] = x [T, K] Wᵀ + b, and + `residual` [T, N] unless that is null.
void multiply_rows(bfloat16 *out, const bfloat16 *x, const Product &product,
                   const bfloat16 *residual, int64_t num_rows, int64_t num_threads);

// out [T, N / 2] = silu(gate) * up for rows [gate | up] of x Wᵀ + b.
void multiply_gated(bfloat16 *out, const bfloat16 *x, const Product &product, int64_t num_rows,
                    int64_t num_threads);
