// The likeliest tokens of rows of logits, and those that are as likely as the last of them.
#include "logits.h"
#include "parallel.h"
#include "shortlist.h"

namespace {

template <typename T>
void find(int64_t *counts, int32_t *ids, float *found, const T *logits, const int64_t *rows,
          const int64_t *wanted, int64_t num_rows, int64_t size, int64_t stride, int64_t capacity,
          int64_t num_threads) {
    for_each(num_threads, num_rows, num_rows * size > 1 << 15, [=](int64_t row) {
        const T *numbers = logits + rows[row] * stride;
        Workspace space(size);
        const float top = largest_of(numbers, size);
        for (int64_t c = 0; c < size; c += LANES)
            store(space.keys + c, top - load_some(numbers + c, size - c));
        pad(space.keys, space.weights, (size + LANES - 1) / LANES * LANES);
        const float limit = limit_for<true>(wanted[row], space.keys, nullptr, size, space);
        const float most = __builtin_fminf(limit, __FLT_MAX__); // what is dropped never counts
        counts[row] = list_wanted(
            size, [&](int64_t c) { return load(space.keys + c) <= most; },
            [&](int64_t i, int64_t n) {
                if (n < capacity) {
                    ids[row * capacity + n] = (int32_t)i;
                    found[row * capacity + n] = to_float(numbers[i]);
                }
            });
    });
}

} // namespace

// For rows of logits [T, size] by number, and how many are wanted of each: how many there are, and
// ids and logits [rows, capacity] of the first of them, in the order of their ids.
#define EXPORT(SUFFIX, T)                                                                          \
    extern "C" void top_tokens_##SUFFIX(int64_t *counts, int32_t *ids, float *found,               \
                                        const T *logits, const int64_t *rows,                      \
                                        const int64_t *wanted, int64_t num_rows, int64_t size,     \
                                        int64_t stride, int64_t capacity, int64_t num_threads) {   \
        find<T>(counts, ids, found, logits, rows, wanted, num_rows, size, stride, capacity,        \
                num_threads);                                                                      \
    }

EXPORT(bfloat16, bfloat16)
EXPORT(float32, float)
