// Softmax over tiles of scores, one after the other (Milakov and Gimelshein 2018).
#pragma once

#include "vector.h"

// The first `count` scores of a tile become weights, the others 0. `top` and `total` are the
// highest score and the sum of the weights so far. Returns the factor to which earlier weights
// shrink.
template <int64_t TILE>
inline float weigh(float *scores, float &top, float &total, int64_t count) {
    for (int64_t k = count; k < TILE; k++)
        scores[k] = -__builtin_inff();
    Lanes highest = load(scores);
    for (int64_t k = LANES; k < TILE; k += LANES)
        highest = larger(highest, load(scores + k));
    const float before = top;
    top = __builtin_fmaxf(before, maximum(highest));
    const float base = top == -__builtin_inff() ? 0 : top; // nothing is seen yet: weights of 0
    Lanes sums = {};
    for (int64_t k = 0; k < TILE; k += LANES) {
        const Lanes weights = exponential(load(scores + k) - base);
        store(scores + k, weights);
        sums += weights;
    }
    const float shrink = exponential(all(before - base))[0];
    total = total * shrink + sum(sums);
    return shrink;
}
