// The small operations between two matrix products, each in one pass over its rows and with the
// roundings of the torch code that it replaces.

#include "parallel.h"
#include "vector.h"

namespace {

constexpr int64_t LARGE = 1 << 16; // numbers that are worth a second thread
constexpr int64_t ROWS = 8;        // of one item of work

template <typename Function>
void for_each_row(int64_t num_threads, int64_t num_rows, int64_t size, const Function &function) {
    for_each(num_threads, (num_rows + ROWS - 1) / ROWS, num_rows * size > LARGE, [&](int64_t item) {
        const int64_t stop = (item + 1) * ROWS < num_rows ? (item + 1) * ROWS : num_rows;
        for (int64_t row = item * ROWS; row < stop; row++)
            function(row);
    });
}

// out = rounded(x / sqrt(mean(x^2) + eps)) * weight; rows of x are `stride` numbers apart.
template <typename T>
void rms_norm(T *out, const T *x, const T *weight, int64_t num_rows, int64_t size, int64_t stride,
              float eps, int64_t num_threads) {
    for_each_row(num_threads, num_rows, size, [=](int64_t row) {
        const T *source = x + row * stride;
        T *target = out + row * size;
        Lanes squares = {};
        for (int64_t c = 0; c < size; c += LANES) {
            Lanes value = load(source + c);
            squares += value * value;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps);
        for (int64_t c = 0; c < size; c += LANES)
            store(target + c, rounded<T>(load(source + c) * scale) * load(weight + c));
    });
}

// [a | b] -> [a | b] * cos + [b | a] * sin for the first `dim` features of a row's heads, in place.
template <typename T>
void rotate(T *x, const T *cos, const T *sin, int64_t num_rows, int64_t num_heads, int64_t dim,
            int64_t stride, int64_t head_stride, int64_t num_threads) {
    for_each_row(num_threads, num_rows, num_heads * dim, [=](int64_t row) {
        const T *c = cos + row * dim, *s = sin + row * dim;
        const int64_t half = dim / 2;
        for (int64_t head = 0; head < num_heads; head++) {
            T *a = x + row * stride + head * head_stride, *b = a + half;
            for (int64_t i = 0; i < half; i += LANES) {
                const Lanes left = load(a + i), right = load(b + i);
                store(a + i, rounded<T>(left * load(c + i)) + right * load(s + i));
                store(b + i, rounded<T>(right * load(c + half + i)) + left * load(s + half + i));
            }
        }
    });
}

// out = rounded(silu(gate)) * up for rows [gate | up] of 2 * size numbers.
template <typename T>
void silu_gated(T *out, const T *x, int64_t num_rows, int64_t size, int64_t num_threads) {
    for_each_row(num_threads, num_rows, size, [=](int64_t row) {
        const T *gate = x + row * 2 * size, *up = gate + size;
        for (int64_t c = 0; c < size; c += LANES) {
            const Lanes value = load(gate + c);
            store(out + row * size + c,
                  rounded<T>(value / (exponential(-value) + 1.0f)) * load(up + c));
        }
    });
}

// x += y, numbers in a row.
template <typename T>
void add(T *x, const T *y, int64_t count, int64_t num_threads) {
    for_each_row(num_threads, count / LANES, LANES, [=](int64_t i) {
        store(x + i * LANES, load(x + i * LANES) + load(y + i * LANES));
    });
}

} // namespace

// All sizes are multiples of 16, half a head too.
#define EXPORT(SUFFIX, T)                                                                          \
    extern "C" void rms_norm_##SUFFIX(T *out, const T *x, const T *weight, int64_t num_rows,       \
                                      int64_t size, int64_t stride, float eps,                     \
                                      int64_t num_threads) {                                       \
        rms_norm<T>(out, x, weight, num_rows, size, stride, eps, num_threads);                     \
    }                                                                                              \
    extern "C" void rotate_##SUFFIX(T *x, const T *cos, const T *sin, int64_t num_rows,            \
                                    int64_t num_heads, int64_t dim, int64_t stride,                \
                                    int64_t head_stride, int64_t num_threads) {                    \
        rotate<T>(x, cos, sin, num_rows, num_heads, dim, stride, head_stride, num_threads);        \
    }                                                                                              \
    extern "C" void silu_gated_##SUFFIX(T *out, const T *x, int64_t num_rows, int64_t size,        \
                                        int64_t num_threads) {                                     \
        silu_gated<T>(out, x, num_rows, size, num_threads);                                        \
    }                                                                                              \
    extern "C" void add_##SUFFIX(T *x, const T *y, int64_t count, int64_t num_threads) {           \
        add<T>(x, y, count, num_threads);                                                          \
    }

EXPORT(bfloat16, bfloat16)
EXPORT(float32, float)
