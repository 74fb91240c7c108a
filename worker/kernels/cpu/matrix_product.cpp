// y = x Wᵀ + b in bfloat16 with float32 sums, for processors with AVX512-BF16 and without AMX (Zen
// 4 and 5). What follows a product is done while its sums are at hand, with the roundings of the
// torch code that it replaces.
#include "matrix_product.h"
#include "panels.h"
#include "parallel.h"

#ifdef __AVX512BF16__

namespace {

constexpr int VECTORS = 2;
constexpr int64_t PANEL = VECTORS * LANES; // outputs
constexpr int64_t DEPTH = 2048; // pairs of inputs of a panel that stay in the L2 cache: 256 KiB
constexpr int64_t BATCH = 192;  // rows whose sums with a panel, 24 KiB, are in hand at once

bool is_large(int64_t num_rows, const Product &product) {
    return num_rows * product.num_outputs * product.num_inputs > 1 << 17;
}

// function(p) for every panel; a thread takes neighbours.
template <typename Function>
void for_each_panel(int64_t num_threads, int64_t num_panels, bool is_large,
                    const Function &function) {
    constexpr int64_t ITEMS = 16; // a thread
    const int64_t num_items = num_panels < ITEMS * num_threads ? num_panels : ITEMS * num_threads;
    for_each(num_threads, num_items, is_large, [&](int64_t item) {
        for (int64_t p = num_panels * item / num_items; p < num_panels * (item + 1) / num_items;
             p++)
            function(p);
    });
}

// The sums of `count` rows with a panel, [count, PANEL]; rows of x are `x_stride` pairs apart.
void multiply_panel(float *sums, const uint32_t *x, int64_t x_stride, const uint32_t *panel,
                    int64_t num_pairs, int64_t count) {
    for (int64_t k = 0; k < num_pairs; k += DEPTH)
        multiply<VECTORS>(sums, x + k, x_stride, panel + k * PANEL,
                          num_pairs - k < DEPTH ? num_pairs - k : DEPTH, k == 0, count);
}

// function(first, count) for pieces of the rows.
template <typename Function>
void for_pieces(int64_t num_rows, const Function &function) {
    for (int64_t first = 0; first < num_rows; first += BATCH)
        function(first, num_rows - first < BATCH ? num_rows - first : BATCH);
}

Lanes load_some(const bfloat16 *source, int64_t count) {
    if (!source)
        return Lanes{};
    if (count >= LANES)
        return load(source);
    bfloat16 memory[LANES] = {};
    memcpy(memory, source, count * sizeof(bfloat16));
    return load(memory);
}

// The sums of a row, rounded, with `residual` or without; a panel's last outputs may be fewer than
// sixteen.
void finish(bfloat16 *out, const float *sums, const bfloat16 *bias, const bfloat16 *residual,
            int64_t width) {
    for (int64_t c = 0; c < width; c += LANES) {
        const int64_t count = width - c;
        Lanes lanes = load(sums + c) + load_some(bias ? bias + c : nullptr, count);
        if (residual)
            lanes = rounded<bfloat16>(lanes) + load_some(residual + c, count);
        bfloat16 memory[LANES];
        store(memory, lanes);
        memcpy(out + c, memory, (count < LANES ? count : LANES) * sizeof(bfloat16));
    }
}

void multiply_rows(bfloat16 *out, const uint32_t *x, int64_t x_stride, const Product &product,
                   const bfloat16 *residual, int64_t num_rows, int64_t num_threads) {
    const int64_t num_outputs = product.num_outputs, num_pairs = product.num_inputs / 2;
    const int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    for_each_panel(num_threads, num_panels, is_large(num_rows, product), [&](int64_t p) {
        alignas(64) float sums[BATCH * PANEL];
        const int64_t at = p * PANEL, left = num_outputs - at, width = left < PANEL ? left : PANEL;
        for_pieces(num_rows, [&](int64_t first, int64_t count) {
            multiply_panel(sums, x + first * x_stride, x_stride, product.packed + at * num_pairs,
                           num_pairs, count);
            for (int64_t r = 0; r < count; r++) {
                const int64_t place = (first + r) * num_outputs + at;
                finish(out + place, sums + r * PANEL, product.bias ? product.bias + at : nullptr,
                       residual ? residual + place : nullptr, width);
            }
        });
    });
}

} // namespace

void multiply_rows(bfloat16 *out, const bfloat16 *x, const Product &product,
                   const bfloat16 *residual, int64_t num_rows, int64_t num_threads) {
    multiply_rows(out, reinterpret_cast<const uint32_t *>(x), product.num_inputs / 2, product,
                  residual, num_rows, num_threads);
}

// N / 2 is a multiple of 32: a panel has gates, and another the same places of what they let
// through.
void multiply_gated(bfloat16 *out, const bfloat16 *x, const Product &product, int64_t num_rows,
                    int64_t num_threads) {
    const int64_t size = product.num_outputs / 2, num_pairs = product.num_inputs / 2;
    const uint32_t *pairs = reinterpret_cast<const uint32_t *>(x);
    for_each_panel(num_threads, size / PANEL, is_large(num_rows, product), [&](int64_t p) {
        alignas(64) float sums[2][BATCH * PANEL];
        for_pieces(num_rows, [&](int64_t first, int64_t count) {
            for (int64_t half = 0; half < 2; half++)
                multiply_panel(sums[half], pairs + first * num_pairs, num_pairs,
                               product.packed + (half * size + p * PANEL) * num_pairs, num_pairs,
                               count);
            for (int64_t r = 0; r < count; r++)
                for (int64_t c = p * PANEL, i = r * PANEL; c < (p + 1) * PANEL;
                     c += LANES, i += LANES) {
                    const bfloat16 *bias = product.bias;
                    const Lanes gate = rounded<bfloat16>(
                        load(sums[0] + i) + load_some(bias ? bias + c : nullptr, LANES));
                    const Lanes up = rounded<bfloat16>(
                        load(sums[1] + i) + load_some(bias ? bias + size + c : nullptr, LANES));
                    store(out + (first + r) * size + c,
                          rounded<bfloat16>(gate / (exponential(-gate) + 1.0f)) * up);
                }
        });
    });
}

// `packed` [N / 32, K / 2, 32, 2], of zeros beyond the last output.
extern "C" void pack_weight(uint32_t *packed, const uint32_t *weight, int64_t num_outputs,
                            int64_t num_pairs, int64_t num_threads) {
    const int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    for_each(num_threads, num_panels, num_outputs * num_pairs > 1 << 16, [=](int64_t p) {
        for (int64_t k = 0; k < num_pairs; k++)
            for (int64_t n = p * PANEL; n < (p + 1) * PANEL; n++)
                packed[(p * num_pairs + k) * PANEL + n % PANEL] =
                    n < num_outputs ? weight[n * num_pairs + k] : 0;
    });
}

// x [T, K] with rows `x_stride` pairs apart; out [T, N]; bias [N] or null. K is even.
extern "C" void matrix_product(bfloat16 *out, const uint32_t *x, const uint32_t *packed,
                               const bfloat16 *bias, int64_t num_rows, int64_t x_stride,
                               int64_t num_outputs, int64_t num_pairs, int64_t num_threads) {
    multiply_rows(out, x, x_stride, {packed, bias, num_outputs, 2 * num_pairs}, nullptr, num_rows,
                  num_threads);
}
#endif
