// y = x Wᵀ + b with both in 8 bits and integer sums, for processors with AVX512-VNNI and without
// AMX.
//
// A row of x is scaled so that its largest magnitude is 127, and shifted by 128: the instruction
// multiplies unsigned by signed numbers. What the shift adds, 128 times a row's sum of the weight,
// is taken off again, so the sums are exact. The weight is packed as in panels.h, in fours:
//
//     panel p, four k:   w[64p][4k .. 4k+3]   w[64p+1][4k .. 4k+3]   ...   64 outputs, 256 bytes
#include "parallel.h"
#include "vector.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

namespace {

constexpr int64_t PANEL = 64;
constexpr int64_t VECTORS = PANEL / LANES;
constexpr int ROWS_TOGETHER = 6;
constexpr int64_t BATCH = 96; // rows whose sums, 24 KiB, are in hand at once
constexpr float LARGEST = 127;
constexpr float OFFSET = 128;

typedef uint8_t Bytes __attribute__((vector_size(16)));

template <typename T>
Lanes load_some(const T *source, int64_t count) {
    if (count >= LANES)
        return load(source);
    T memory[LANES] = {};
    memcpy(memory, source, count * sizeof(T));
    return load(memory);
}

// One row, `size` numbers, filled up to `padded`. Returns its largest magnitude.
template <typename T>
float quantize(uint8_t *q, const T *x, int64_t size, int64_t padded) {
    Lanes tops = {};
    Bits is_nan = {};
    for (int64_t k = 0; k < size; k += LANES) {
        const Lanes values = load_some(x + k, size - k);
        tops = larger((Lanes)((Bits)values & 0x7fffffff), tops);
        is_nan |= (Bits)(values != values);
    }
    const float largest = __builtin_reduce_or(is_nan) ? __builtin_nanf("") : maximum(tops);
    const float scale = largest > 0 ? LARGEST / largest : 0;
    for (int64_t k = 0; k < size; k += LANES) { // positive: truncated is rounded
        const Lanes values = load_some(x + k, size - k) * scale + (OFFSET + 0.5f);
        const Bytes bytes =
            __builtin_convertvector(__builtin_convertvector(values, Integers), Bytes);
        memcpy(q + k, &bytes, padded - k < LANES ? padded - k : LANES);
    }
    return largest;
}

template <int ROWS>
inline void tile(int32_t *sums, const uint32_t *q, int64_t stride, const uint32_t *panel,
                 int64_t count) {
    __m512i totals[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < count; k++) {
        __m512i weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = _mm512_loadu_si512(panel + k * PANEL + v * LANES);
        for (int r = 0; r < ROWS; r++) {
            const __m512i four = _mm512_set1_epi32((int)q[r * stride + k]);
            for (int v = 0; v < VECTORS; v++)
                totals[r][v] = _mm512_dpbusd_epi32(totals[r][v], four, weights[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            _mm512_storeu_si512(sums + r * PANEL + v * LANES, totals[r][v]);
}

void multiply(int32_t *sums, const uint32_t *q, int64_t stride, const uint32_t *panel,
              int64_t count, int64_t num_rows) {
    for (; num_rows >= ROWS_TOGETHER;
         num_rows -= ROWS_TOGETHER, sums += ROWS_TOGETHER * PANEL, q += ROWS_TOGETHER * stride)
        tile<ROWS_TOGETHER>(sums, q, stride, panel, count);
    switch (num_rows) {
    case 1:
        return tile<1>(sums, q, stride, panel, count);
    case 2:
        return tile<2>(sums, q, stride, panel, count);
    case 3:
        return tile<3>(sums, q, stride, panel, count);
    case 4:
        return tile<4>(sums, q, stride, panel, count);
    case 5:
        return tile<5>(sums, q, stride, panel, count);
    }
}

inline void write(float *target, float value) {
    *target = value;
}
inline void write(bfloat16 *target, float value) {
    bfloat16 memory[LANES];
    store(memory, all(value));
    *target = memory[0];
}

// Sums to numbers: `shift` is what the offset of x has added to an output.
template <typename T>
void finish(T *out, const int32_t *sums, const float *scales, const int32_t *shift,
            const float *bias, float largest, int64_t width) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        Integers exact, less;
        memcpy(&exact, sums + c, sizeof exact);
        memcpy(&less, shift + c, sizeof less);
        Lanes y = __builtin_convertvector(exact - less, Lanes) * load(scales + c) * largest;
        store(out + c, bias ? y + load(bias + c) : y);
    }
    for (; c < width; c++) {
        const float y = (float)(sums[c] - shift[c]) * scales[c] * largest;
        write(out + c, bias ? y + bias[c] : y);
    }
}

template <typename T>
void product(T *out, const T *x, const uint32_t *packed, const float *scales, const int32_t *shift,
             const float *bias, uint8_t *q, float *largest, int64_t num_rows, int64_t x_stride,
             int64_t num_outputs, int64_t num_inputs, int64_t num_threads) {
    const int64_t fours = (num_inputs + 3) / 4, num_panels = (num_outputs + PANEL - 1) / PANEL;
    for_each(num_threads, num_rows, num_rows * num_inputs > 1 << 15, [=](int64_t r) {
        largest[r] = quantize(q + r * fours * 4, x + r * x_stride, num_inputs, fours * 4);
    });
    const bool is_large = num_rows * num_outputs * fours > 1 << 16;
    for_each(num_threads, num_panels, is_large, [=](int64_t p) {
        alignas(64) int32_t sums[BATCH * PANEL];
        const int64_t at = p * PANEL;
        const int64_t width = num_outputs - at < PANEL ? num_outputs - at : PANEL;
        for (int64_t first = 0; first < num_rows; first += BATCH) {
            const int64_t count = num_rows - first < BATCH ? num_rows - first : BATCH;
            multiply(sums, (const uint32_t *)q + first * fours, fours, packed + p * fours * PANEL,
                     fours, count);
            for (int64_t r = 0; r < count; r++)
                finish(out + (first + r) * num_outputs + at, sums + r * PANEL, scales + at,
                       shift + at, bias ? bias + at : nullptr, largest[first + r], width);
        }
    });
}

} // namespace

// `packed` [N / 64, K / 4, 64, 4], of zeros beyond the last output and input; `shift` [N].
extern "C" void pack_int8(int8_t *packed, int32_t *shift, const int8_t *weight, int64_t num_outputs,
                          int64_t num_inputs, int64_t num_threads) {
    const int64_t fours = (num_inputs + 3) / 4, num_panels = (num_outputs + PANEL - 1) / PANEL;
    for_each(num_threads, num_panels, num_outputs * num_inputs > 1 << 16, [=](int64_t p) {
        for (int64_t n = p * PANEL; n < (p + 1) * PANEL; n++) {
            int32_t total = 0;
            for (int64_t k = 0; k < fours * 4; k++) {
                const bool is_there = n < num_outputs && k < num_inputs;
                const int8_t value = is_there ? weight[n * num_inputs + k] : 0;
                packed[((p * fours + k / 4) * PANEL + n % PANEL) * 4 + k % 4] = value;
                total += value;
            }
            if (n < num_outputs)
                shift[n] = (int32_t)OFFSET * total;
        }
    });
}

// x [T, K] with rows `x_stride` numbers apart, out [T, N], scales [N], bias [N] or null; `q` is
// room for T rows of K bytes in whole fours, `largest` for T numbers.
#define EXPORT(SUFFIX, T)                                                                          \
    extern "C" void int8_product_##SUFFIX(                                                         \
        T *out, const T *x, const uint32_t *packed, const float *scales, const int32_t *shift,     \
        const float *bias, uint8_t *q, float *largest, int64_t num_rows, int64_t x_stride,         \
        int64_t num_outputs, int64_t num_inputs, int64_t num_threads) {                            \
        product<T>(out, x, packed, scales, shift, bias, q, largest, num_rows, x_stride,            \
                   num_outputs, num_inputs, num_threads);                                          \
    }

EXPORT(bfloat16, bfloat16)
EXPORT(float32, float)
#endif
