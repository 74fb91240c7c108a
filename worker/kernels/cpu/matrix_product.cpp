// y = x Wᵀ + b in bfloat16 with float32 sums, for processors with AVX512-BF16 and without AMX (Zen
// 4 and 5).
//
// The weight [N, K] is packed once, so that the instruction's sixteen pairs are sixteen outputs:
//
//     panel p, pair k:   w[64p][2k] w[64p][2k+1]   w[64p+1][2k] w[64p+1][2k+1]   ...   64 outputs,
//     256 bytes
//
// A panel is read once from memory, and from the cache for each further tile of rows.

#include "parallel.h"
#include "vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t PANEL = 64; // outputs
constexpr int64_t VECTORS = PANEL / LANES;
constexpr int TILE = 6;         // rows: 6 x 4 sums and 4 weights in 32 registers
constexpr int64_t DEPTH = 1024; // pairs of inputs of a panel that stay in the L2 cache: 256 KiB

// ROWS rows of x times `count` pairs of a panel, added to `sums` [ROWS, PANEL].
template <int ROWS>
inline void tile(float *sums, const uint32_t *x, int64_t x_stride, const uint32_t *panel,
                 int64_t count, bool is_first) {
    __m512 totals[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            totals[r][v] =
                is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * PANEL + v * LANES);
    for (int64_t k = 0; k < count; k++) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + v * LANES);
        for (int r = 0; r < ROWS; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[r * x_stride + k]);
            for (int v = 0; v < VECTORS; v++)
                totals[r][v] = _mm512_dpbf16_ps(totals[r][v], weights[v], pair);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            _mm512_storeu_ps(sums + r * PANEL + v * LANES, totals[r][v]);
}

void tiles(float *sums, const uint32_t *x, int64_t x_stride, const uint32_t *panel, int64_t count,
           bool is_first, int64_t num_rows) {
    for (; num_rows >= TILE; num_rows -= TILE, sums += TILE * PANEL, x += TILE * x_stride)
        tile<TILE>(sums, x, x_stride, panel, count, is_first);
    switch (num_rows) {
    case 1:
        return tile<1>(sums, x, x_stride, panel, count, is_first);
    case 2:
        return tile<2>(sums, x, x_stride, panel, count, is_first);
    case 3:
        return tile<3>(sums, x, x_stride, panel, count, is_first);
    case 4:
        return tile<4>(sums, x, x_stride, panel, count, is_first);
    case 5:
        return tile<5>(sums, x, x_stride, panel, count, is_first);
    }
}

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

// `packed` [N / 64, K / 2, 64, 2], of zeros beyond the last output.
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
    constexpr int64_t BATCH = 96; // rows whose sums, 24 KiB, are in hand at once
    const int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
    for_each(num_threads, num_panels, num_rows * num_outputs * num_pairs > 1 << 16, [&](int64_t p) {
        alignas(64) float sums[BATCH * PANEL];
        const uint32_t *panel = packed + p * num_pairs * PANEL;
        const int64_t width = num_outputs - p * PANEL < PANEL ? num_outputs - p * PANEL : PANEL;
        for (int64_t first = 0; first < num_rows; first += BATCH) {
            const int64_t count = num_rows - first < BATCH ? num_rows - first : BATCH;
            for (int64_t k = 0; k < num_pairs; k += DEPTH)
                tiles(sums, x + first * x_stride + k, x_stride, panel + k * PANEL,
                      num_pairs - k < DEPTH ? num_pairs - k : DEPTH, k == 0, count);
            for (int64_t r = 0; r < count; r++)
                finish(out + (first + r) * num_outputs + p * PANEL, sums + r * PANEL,
                       bias ? bias + p * PANEL : nullptr, width);
        }
    });
}
#endif
