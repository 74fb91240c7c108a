// bfloat16 products of rows with a panel of a weight, for processors with AVX512-BF16.
//
// A weight [N, K] is packed so that the instruction's sixteen pairs are sixteen outputs:
//
//     panel p, pair k:   w[32p][2k] w[32p][2k+1]   w[32p+1][2k] w[32p+1][2k+1]   ...   32 outputs
//
// A panel comes from memory once, and from the cache for each further tile of rows.
#pragma once

#include "vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

// Sums and weights that fit into 32 registers.
template <int VECTORS>
constexpr int ROWS_TOGETHER = 24 / VECTORS;

// ROWS rows of x times `count` pairs of a panel of VECTORS * 16 outputs, added to `sums`. Meanwhile
// `ahead`, as many lines of memory, comes to the L2 cache.
template <int VECTORS, int ROWS>
inline void tile(float *sums, const uint32_t *x, int64_t x_stride, const uint32_t *panel,
                 int64_t count, bool is_first, const uint32_t *ahead) {
    constexpr int64_t PANEL = VECTORS * LANES;
    __m512 totals[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            totals[r][v] =
                is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * PANEL + v * LANES);
    for (int64_t k = 0; k < count; k++) {
        if (ahead)
            __builtin_prefetch(ahead + k * LANES, 0, 2);
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

// Fewer rows than fit together.
template <int VECTORS, int ROWS = ROWS_TOGETHER<VECTORS> - 1>
inline void rest(float *sums, const uint32_t *x, int64_t x_stride, const uint32_t *panel,
                 int64_t count, bool is_first, const uint32_t *ahead, int64_t num_rows) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS)
            tile<VECTORS, ROWS>(sums, x, x_stride, panel, count, is_first, ahead);
        else
            rest<VECTORS, ROWS - 1>(sums, x, x_stride, panel, count, is_first, ahead, num_rows);
    }
}

// Any number of rows of `sums` [num_rows, VECTORS * 16]. Where they take several passes over the
// panel, what follows it in memory comes nearer meanwhile: most likely the next panel. A single
// pass is bound by memory anyway, and its addresses are easy to guess.
template <int VECTORS>
inline void multiply(float *sums, const uint32_t *x, int64_t x_stride, const uint32_t *panel,
                     int64_t count, bool is_first, int64_t num_rows) {
    constexpr int64_t ROWS = ROWS_TOGETHER<VECTORS>;
    const int64_t size = count * VECTORS * LANES;
    const uint32_t *ahead = num_rows > ROWS ? panel + size : nullptr;
    for (; num_rows >= ROWS;
         num_rows -= ROWS, sums += ROWS * VECTORS * LANES, x += ROWS * x_stride) {
        tile<VECTORS, ROWS>(sums, x, x_stride, panel, count, is_first, ahead);
        if (ahead)
            ahead = ahead + count * LANES < panel + 2 * size ? ahead + count * LANES : nullptr;
    }
    rest<VECTORS>(sums, x, x_stride, panel, count, is_first, ahead, num_rows);
}
#endif
