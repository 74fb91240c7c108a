// The greedy choice from the logits of a vocabulary.
#include "logits.h"
#include "parallel.h"

namespace {

template <typename T>
int64_t find(const T *x, int64_t size, float value) {
    for (int64_t c = 0; c < size; c += LANES)
        if (__builtin_reduce_or((Bits)(load_some(x + c, size - c) == value)))
            for (int64_t i = c; i < c + LANES; i++)
                if (to_float(x[i]) == value)
                    return i;
    return 0; // there is no number in x: its sum says so
}

template <typename T>
void choose(int64_t *tokens, float *largest, float *totals, const T *x, int64_t num_rows,
            int64_t size, int64_t stride, int64_t num_threads) {
    for_each(num_threads, num_rows, num_rows * size > 1 << 15, [=](int64_t row) {
        const T *numbers = x + row * stride;
        const float top = largest_of(numbers, size);
        Lanes sums = {};
        for (int64_t c = 0; c < size; c += LANES)
            sums += exponential(load_some(numbers + c, size - c) - top);
        tokens[row] = find(numbers, size, top);
        largest[row] = top;
        totals[row] = sum(sums);
    });
}

} // namespace

// Of each row of x [T, size]: the first of the largest numbers, that number, and the sum of
// exp(number - largest), which is NaN where a number is NaN or infinite, or all are -infinite.
#define EXPORT(SUFFIX, T)                                                                          \
    extern "C" void greedy_##SUFFIX(int64_t *tokens, float *largest, float *totals, const T *x,    \
                                    int64_t num_rows, int64_t size, int64_t stride,                \
                                    int64_t num_threads) {                                         \
        choose<T>(tokens, largest, totals, x, num_rows, size, stride, num_threads);                \
    }

EXPORT(bfloat16, bfloat16)
EXPORT(float32, float)
