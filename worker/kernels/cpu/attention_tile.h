// What one query a sequence does with a tile of keys and values: scores, and sums of weighted
// values.
#pragma once

#include "vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int64_t TILE = 32; // tokens whose scores are in hand at once

// Queries are multiplied with keys STEP numbers at a time: as floats, or as they are where the
// processor multiplies pairs of bfloat16.
template <typename T>
struct Multiplied {
    typedef float Number;
    static constexpr int64_t STEP = LANES;
};
#ifdef __AVX512BF16__
template <>
struct Multiplied<bfloat16> {
    typedef bfloat16 Number;
    static constexpr int64_t STEP = 2 * LANES;
};
#endif
template <typename T>
using Query = typename Multiplied<T>::Number;
template <typename T>
constexpr int64_t STEP = Multiplied<T>::STEP;

inline int64_t padded(int64_t dim) {
    return (dim + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
}

// totals[i][j] += the lanes of STEP numbers of query i and a key, of which `left` are left.
template <int N, typename T>
inline void add_products(Lanes (*totals)[4], int j, const float *queries, int64_t stride,
                         const T *key, int64_t) {
    const Lanes numbers = load(key);
    for (int i = 0; i < N; i++)
        totals[i][j] += load(queries + i * stride) * numbers;
}
#ifdef __AVX512BF16__
template <int N>
inline void add_products(Lanes (*totals)[4], int j, const bfloat16 *queries, int64_t stride,
                         const bfloat16 *key, int64_t left) {
    const __m512bh numbers = left >= STEP<bfloat16>
                                 ? (__m512bh)_mm512_loadu_si512(key)
                                 : (__m512bh)_mm512_zextsi256_si512(
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i *>(key)));
    for (int i = 0; i < N; i++)
        totals[i][j] = (Lanes)_mm512_dpbf16_ps((__m512)totals[i][j], numbers,
                                               (__m512bh)_mm512_loadu_si512(queries + i * stride));
}
#endif

// The processor guesses badly where the next tile lies, so it is told: while a tile is computed,
// the same numbers of the next one are on their way to the L2 cache. All at once they would hold up
// the loads of this one.
template <typename T>
inline void prefetch(const T *numbers, int64_t count) {
    for (int64_t c = 0; c < count; c += 64 / (int64_t)sizeof(T))
        __builtin_prefetch(numbers + c, 0, 2);
}

// Two tiles: the one that is computed and the one after it.
template <typename T>
struct Tiles {
    const T *const *now;
    const T *const *ahead;
};

// scores[i][k] = queries[i] . key of token k, which is `at` numbers into it. Four tokens at a time,
// whose totals stay in registers; their lanes are added up for sixteen at once.
template <typename T, int N>
inline void score(float (*scores)[TILE], const Query<T> *queries, Tiles<T> tiles, int64_t at,
                  int64_t count, int64_t dim, float scale) {
    for (int64_t first = 0; first < count; first += LANES) {
        Lanes quarters[N][4] = {};
        for (int64_t k = first; k < first + LANES && k < count; k += 4) {
            const T *keys[4];
            for (int j = 0; j < 4; j++) {
                keys[j] = tiles.now[k + j] + at;
                prefetch(tiles.ahead[k + j] + at, dim);
            }
            Lanes totals[N][4] = {};
            for (int64_t c = 0; c < dim; c += STEP<T>)
                for (int j = 0; j < 4; j++)
                    add_products<N>(totals, j, queries + c, padded(dim), keys[j] + c, dim - c);
            for (int i = 0; i < N; i++)
                quarters[i][(k - first) / 4] = quarter_sums(totals[i]);
        }
        for (int i = 0; i < N; i++)
            store(scores[i] + first, sums_of_quarters(quarters[i]) * scale);
    }
}

// sums[i] += weights[i][k] * value of token k; PAIRS pairs of N queries stay in registers.
template <typename T, int N, int PAIRS>
inline void accumulate(float *sums, const float (*weights)[TILE], Tiles<T> tiles, int64_t at,
                       int64_t count, int64_t dim) {
    Pair totals[N][PAIRS];
    for (int i = 0; i < N; i++)
        for (int p = 0; p < PAIRS; p++)
            totals[i][p] = load_pair(sums + i * dim + p * 2 * LANES);
    for (int64_t k = 0; k < count; k++) {
        prefetch(tiles.ahead[k] + at, PAIRS * 2 * LANES);
        for (int p = 0; p < PAIRS; p++) {
            const Pair value = load_pair(tiles.now[k] + at + p * 2 * LANES);
            for (int i = 0; i < N; i++) {
                totals[i][p].first += weights[i][k] * value.first;
                totals[i][p].second += weights[i][k] * value.second;
            }
        }
    }
    for (int i = 0; i < N; i++)
        for (int p = 0; p < PAIRS; p++)
            store_pair(sums + i * dim + p * 2 * LANES, totals[i][p]);
}

// The last sixteen of a `dim` that is no multiple of 32.
template <typename T, int N>
inline void accumulate_rest(float *sums, const float (*weights)[TILE], Tiles<T> tiles, int64_t at,
                            int64_t count, int64_t dim) {
    for (int i = 0; i < N; i++) {
        Lanes total = load(sums + i * dim);
        for (int64_t k = 0; k < count; k++)
            total += weights[i][k] * load(tiles.now[k] + at);
        store(sums + i * dim, total);
    }
}
