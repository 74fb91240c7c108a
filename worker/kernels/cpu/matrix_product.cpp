// y = x Wᵀ + b in bfloat16 with float32 sums, for processors with AVX512-BF16 and without AMX (Zen
// 4 and 5).
#include "panels.h"
#include "parallel.h"
#include "vector.h"

#ifdef __AVX512BF16__

namespace {

constexpr int VECTORS = 2;
constexpr int64_t PANEL = VECTORS * LANES; // outputs
constexpr int64_t DEPTH = 2048; // pairs of inputs of a panel that stay in the L2 cache: 256 KiB

// The sums of a row, rounded; a panel's last outputs may be fewer than sixteen.
void finish(bfloat16 *out, const float *sums, const bfloat16 *bias, int64_t width) {
    for (int64_t c = 0; c < width; c += LANES) {
        const int64_t count = width - c < LANES ? width - c : LANES;
        bfloat16 memory[LANES] = {};
        if (bias)
            memcpy(memory, bias + c, count * sizeof(bfloat16));
        store(memory, load(sums + c) + load(memory));
        memcpy(out + c, memory, count * sizeof(bfloat16));
    }
}

} // namespace

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
    constexpr int64_t ITEMS = 16;  // a thread, of neighbouring panels
    constexpr int64_t BATCH = 192; // rows whose sums, 24 KiB, are in hand at once
    const int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    const int64_t num_items = num_panels < ITEMS * num_threads ? num_panels : ITEMS * num_threads;
    const bool is_large = num_rows * num_outputs * num_pairs > 1 << 16;
    auto multiply_panel = [&](int64_t p) {
        alignas(64) float sums[BATCH * PANEL];
        const uint32_t *panel = packed + p * num_pairs * PANEL;
        const int64_t width = num_outputs - p * PANEL < PANEL ? num_outputs - p * PANEL : PANEL;
        for (int64_t first = 0; first < num_rows; first += BATCH) {
            const int64_t count = num_rows - first < BATCH ? num_rows - first : BATCH;
            for (int64_t k = 0; k < num_pairs; k += DEPTH)
                multiply<VECTORS>(sums, x + first * x_stride + k, x_stride, panel + k * PANEL,
                                  num_pairs - k < DEPTH ? num_pairs - k : DEPTH, k == 0, count);
            for (int64_t r = 0; r < count; r++)
                finish(out + (first + r) * num_outputs + p * PANEL, sums + r * PANEL,
                       bias ? bias + p * PANEL : nullptr, width);
        }
    };
    for_each(num_threads, num_items, is_large, [&](int64_t item) {
        for (int64_t p = num_panels * item / num_items; p < num_panels * (item + 1) / num_items;
             p++)
            multiply_panel(p);
    });
}
#endif
