// Rows of logits, of which the last lanes may lack numbers: they read as -infinite, which nobody
// chooses.
#pragma once

#include "vector.h"

template <typename T>
static inline Lanes load_some(const T *source, int64_t count) {
    if (count >= LANES)
        return load(source);
    Lanes lanes = all(-__builtin_inff());
    for (int64_t i = 0; i < count; i++)
        lanes[i] = to_float(source[i]);
    return lanes;
}

template <typename T>
static inline float largest_of(const T *logits, int64_t size) {
    Lanes tops = all(-__builtin_inff());
    for (int64_t c = 0; c < size; c += LANES)
        tops = larger(load_some(logits + c, size - c), tops);
    return maximum(tops);
}
