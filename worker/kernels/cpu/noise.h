// The random numbers of worker/sampling/noise.py, which says where they come from.
#pragma once

#include "vector.h"

// MurmurHash3's 32-bit finaliser.
static inline Bits mixed(Bits bits) {
    bits ^= bits >> 16;
    bits *= 0x85ebca6b;
    bits ^= bits >> 13;
    bits *= 0xc2b2ae35;
    return bits ^ bits >> 16;
}

// Standard exponential numbers, > 0: -log(1 - u), u uniform in (0, 1).
static inline Lanes exponential_noise(Bits tokens, const uint32_t key[2]) {
    const Bits hash = mixed((mixed(tokens) ^ key[0]) * key[1]) ^ 0x80000000;
    // hash + 1/2, rounded once: its halves are exact.
    const Lanes high = __builtin_convertvector((Integers)(hash >> 16), Lanes) * 0x1p16f;
    const Lanes low = __builtin_convertvector((Integers)(hash & 0xffff), Lanes) + 0.5f;
    Lanes u = (high + low) * 0x1p-32f;
    const Lanes largest = all(1 - 0x1p-24f);
    u = u < largest ? u : largest;
    const Lanes rest = 1.0f - u;
    const Lanes lost = (1.0f - rest) - u; // by rounding, which is all of a small u
    return -(logarithm(rest) + lost / rest);
}
