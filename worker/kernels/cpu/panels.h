// bfloat16 products of rows with a panel of a weight, for processors with AVX512-BF16.
//
// A weight [N, K] is packed so that the instruction's sixteen pairs are sixteen outputs:
//
//     panel p, pair k:   w[64p][2k] w[64p][2k+1]   w[64p+1][2k] w[64p+1][2k+1]   ...   64 outputs
//
// A panel comes from memory once, and from the cache for each further tile of rows.
#pragma once

#include "vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

constexpr int64_t PANEL = 64; // outputs
constexpr int64_t VECTORS = PANEL / LANES;
constexpr int ROWS_TOGETHER = 6; // 6 x 4 sums and 4 weights in 32 registers

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

// Any number of rows.
inline void multiply(float *sums, const uint32_t *x, int64_t x_stride, const uint32_t *panel,
                     int64_t count, bool is_first, int64_t num_rows) {
    for (; num_rows >= ROWS_TOGETHER;
         num_rows -= ROWS_TOGETHER, sums += ROWS_TOGETHER * PANEL, x += ROWS_TOGETHER * x_stride)
        tile<ROWS_TOGETHER>(sums, x, x_stride, panel, count, is_first);
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
#endif
