// Sixteen float lanes, and bfloat16 numbers as they lie in memory. The compiler's vector
// extensions: one source for AVX-512 (a register), AVX2 (two) and NEON (four).
#pragma once

#include <stdint.h>
#include <string.h>

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t LANES = 16;

struct bfloat16 {
    uint16_t bits;
};

static inline Lanes all(float value) {
    return value - (Lanes){};
}

static inline Lanes load(const float *source) {
    Lanes lanes;
    memcpy(&lanes, source, sizeof lanes);
    return lanes;
}

static inline Lanes load(const bfloat16 *source) {
    Halves halves;
    memcpy(&halves, source, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
}

static inline void store(float *target, Lanes lanes) {
    memcpy(target, &lanes, sizeof lanes);
}

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
static inline void store(bfloat16 *target, Lanes lanes) {
    Bits bits = (Bits)lanes;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits is_nan = (Bits)(lanes != lanes);
    Halves halves = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Halves);
    memcpy(target, &halves, sizeof halves);
}

// A value as it is after a detour through memory: layers are tested against implementations that
// round there.
template <typename T>
static inline Lanes rounded(Lanes lanes);
template <>
inline Lanes rounded<float>(Lanes lanes) {
    return lanes;
}
template <>
inline Lanes rounded<bfloat16>(Lanes lanes) {
    bfloat16 memory[LANES];
    store(memory, lanes);
    return load(memory);
}

static inline float to_float(float value) {
    return value;
}
static inline float to_float(bfloat16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// The lanes combined in pairs, then the results, and so on.
template <typename Combine>
static inline float reduced(Lanes x, Combine combine) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight = combine(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                          __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    Four four = combine(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                        __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    four = combine(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return combine(four, __builtin_shufflevector(four, four, 1, 0, 3, 2))[0];
}

static inline float sum(Lanes lanes) {
    return reduced(lanes, [](auto a, auto b) { return a + b; });
}

static inline float maximum(Lanes lanes) {
    return reduced(lanes, [](auto a, auto b) { return a > b ? a : b; });
}

static inline Lanes larger(Lanes a, Lanes b) {
    return a > b ? a : b;
}

// e^x to about 1e-7 relative, by x = n ln 2 + r and a polynomial in r (Cephes, expf); 0 below -87,
// NaN of NaN.
static inline Lanes exponential(Lanes x) {
    const Lanes smallest = all(-87.0f);
    const Lanes given = x;
    const auto is_zero = x < smallest, is_nan = x != x;
    x = larger(x, smallest);
    x = x > 88.0f ? all(88.0f) : x;
    const Lanes magic = all(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    Lanes n = (x * 1.44269504088896341f + magic) - magic;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Lanes power = (Lanes)((__builtin_convertvector(n, Integers) + 127) << 23);
    p = is_zero ? Lanes{} : p * power;
    return is_nan ? given : p;
}
